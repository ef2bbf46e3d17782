"""Made pictures, clips and sound as the bytes of ordinary files. The same input gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np
import soundfile
from PIL import Image

# x264's macroblock tree now and then gives other bytes for the same frames, about once in thirty files.
_X264 = {"preset": "veryfast", "crf": "16", "threads": "1", "x264-params": "mbtree=0:weightp=0"}
_VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "threads": "1"}
_AAC = {"aac_coder": "fast", "b": "32000", "flags": "+bitexact"}
_OPUS = {"compression_level": "0", "b": "24000", "flags": "+bitexact"}
_CODECS = {
    "mp4": (("libx264", _X264), ("aac", _AAC)),
    "webm": (("libvpx-vp9", _VP9), ("libopus", _OPUS)),
}
_SOUND_RATE = 16000


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def flac(samples: np.ndarray, rate: int) -> bytes:
    """16-bit FLAC of float samples (samples,) in [-1, 1]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def video(frames: Sequence[np.ndarray], rate: Fraction, container: str, sound: np.ndarray | None = None) -> bytes:
    """Encodes RGB frames as H.264 in mp4 or VP9 in webm.

    Args:
        frames: each (height, width, 3) uint8, sides even.
        rate: frames per second.
        container: "mp4" or "webm".
        sound: float (samples,) at 16 kHz for a mono sound track (AAC or Opus), or None for no track.
    """
    (video_codec, options), (audio_codec, audio_options) = _CODECS[container]
    buffer = io.BytesIO()
    # "bitexact" keeps library versions, dates and random identifiers out of the file.
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as output:
        stream = cast(av.VideoStream, output.add_stream(video_codec, rate=rate, options=dict(options)))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        track = None
        if sound is not None:
            options = dict(audio_options)
            track = cast(av.AudioStream, output.add_stream(audio_codec, rate=_SOUND_RATE, options=options))
            track.layout = "mono"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
        if track is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
            samples.sample_rate = _SOUND_RATE
            samples.pts = 0
            output.mux(track.encode(samples))
            output.mux(track.encode())
    return buffer.getvalue()
