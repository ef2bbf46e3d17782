"""Encoders for the tests of decoding: libav writes what `herdkit.data.media` must read."""

from fractions import Fraction

import av
import numpy as np
import pytest


def encode_video(
    path,
    codec="libx264",
    *,
    format=None,
    frames=30,
    size=(64, 48),
    rate=10,
    stamps=None,
    time_base=None,
    pixels="yuv420p",
    sound=None,
    rotation=None,
    options=None,
    container_options=None,
):
    """Frame i is grey of brightness 8 * i (mod 256), with a red top left quarter; returns the bytes.

    `stamps` are presentation times in units of `time_base`; `sound` is an audio codec for a 440 Hz tone.
    """
    width, height = size
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if sound is not None:
            track = container.add_stream(sound, rate=48_000)
            track.layout = "mono"
        for index in range(frames):
            picture = np.full((height, width, 3), 8 * index % 256, np.uint8)
            picture[: height // 2, : width // 2] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], time_base or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000 * frames // rate) / 48_000)
            mux_sound(container, track, tone[None].astype(np.float32), 48_000, "mono")
    return path.read_bytes()


def encode_audio(path, samples, rate, codec="aac", layout="mono"):
    """(channels, samples) float32 as the sound of a file whose container the name's ending says."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate)
        track.layout = layout
        mux_sound(container, track, samples, rate, layout)
    return path.read_bytes()


def mux_sound(container, track, samples, rate, layout):
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate, frame.pts = rate, 0
    container.mux(track.encode(frame))
    container.mux(track.encode())


@pytest.fixture
def video(tmp_path):
    """`encode_video` to a new file; returns its bytes."""
    count = 0

    def encode(ending="mp4", *args, **options):
        nonlocal count
        count += 1
        return encode_video(tmp_path / f"clip{count}.{ending}", *args, **options)

    return encode


@pytest.fixture
def audio(tmp_path):
    """`encode_audio` to a new file; returns its bytes."""

    def encode(ending, *args, **options):
        return encode_audio(tmp_path / f"sound.{ending}", *args, **options)

    return encode
