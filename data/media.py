"""Decoding of images, video and sound: the only place that touches codecs.

A source is a path, bytes, or a binary file object. Whatever is wrong with it (missing, empty, a directory,
truncated, of another kind, too large) is a `MediaError` that names it. Sources are not trusted: only formats
whose first bytes identify them are tried, file names decide nothing, and nothing that a file refers to is
opened.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import av
import numpy as np
import soundfile
import torch
import torchaudio
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from .video_seek import on_show, picture_of

Source = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

MAX_PIXELS = 2 * 89_478_485
"""The most pixels an image or a video frame may declare: Pillow's own limit, 0.5 GB as RGB."""

SAMPLE_RATES = (1_000, 768_000)
"""The sample rates that are believed, in Hz; the resampler's size depends on them."""

_IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "QOI")

# Containers with timestamps and a signature. Raw streams, playlists and subtitles stay outside: libav would
# take a text file for one of them. Those of the first row declare their true duration in a header.
_TIMED_CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "flv", "asf")
_OTHER_CONTAINERS = (
    *("mpegts", "mpeg", "gif", "apng", "ogg", "mxf", "ivf", "rm", "mp3", "aac", "wav", "w64"),
    *("flac", "aiff", "au", "caf", "amr", "ac3", "eac3", "dts", "ape", "wv", "tta", "mpc8"),
)
_LIBAV_OPTIONS = {
    "format_whitelist": ",".join(_TIMED_CONTAINERS + _OTHER_CONTAINERS),
    "protocol_whitelist": "none",
}


class MediaError(ValueError):
    """A medium that cannot be decoded: "<file>: <reason>", one line. `reason` is the second part, `source` what was to
    be decoded."""

    source: Any = None

    def __init__(self, name: str, reason: object):
        self.reason = " ".join(str(reason).split())
        super().__init__(f"{name}: {self.reason}")


@dataclass
class Clip:
    """Frames of a video.

    Args:
        frames: (F, 3, H, W) uint8, RGB.
        times: (F,) float32, seconds from the first frame of the video to each of these.
    """

    frames: Tensor
    times: Tensor


def load_image(source: Source | Image.Image) -> Image.Image:
    """Decodes an image to 8-bit RGB, turned upright by its EXIF orientation, transparency over white.

    16-bit grey is scaled to 8 bits, colour profiles are not applied, and of an animation the first frame
    counts. EXIF data that cannot be parsed is taken as absent, as viewers do.

    Raises:
        MediaError: see the top of the file; also images of more than `MAX_PIXELS` pixels, and images of
            floating-point or 32-bit values, which have no fixed range.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, f"<image {getattr(source, 'filename', '') or 'object'}>")
    with _opened(source, "image") as (name, file), _open_image(name, file) as image:
        return _upright_rgb(image, name)


def load_video(source: Source, frames: int, size: int | None = None, *, whole: bool = False) -> Clip:
    """Samples frames of a video uniformly over its whole duration.

    The duration runs from the first frame's time to the end of the last frame's. It is cut into `frames`
    equal slices, and the frame on show at the centre of each is taken (one that begins just there counts). So
    the rule holds for any rate, also a variable one; of a video with fewer frames some are taken repeatedly.
    Where the stream tells the times of its frames, only what is needed for those taken is decoded, from the key
    frame before each; else the stream from its start, once and in order. Only the frames taken are kept; the compressed
    stream is held in memory. Rotation metadata is applied. Pixels are taken as square.

    Args:
        frames: how many, at least 1.
        size: the longer side of the result in pixels, if the video's is longer.
        whole: decode everything up to the last frame taken, so that damage between frames is found too.

    Raises:
        MediaError: see the top of the file; also a file without a picture track (cover art is none), and one
            that ends before nine tenths of the duration that it declares.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    with _opened(source, "video") as (name, file), _demuxed(name, file, "video") as (stream, packets):
        context = stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            raise MediaError(name, f"frames of {context.width} x {context.height} pixels are too large")
        start, end, step, by_rank = _timing(packets, stream.container.format.name)
        reformatter = VideoReformatter()  # not thread-safe, so one for each clip
        picked: list[Tensor] = []
        times: list[float] = []
        # In integers of the stream's time base, all times 2 * frames: ties must not hang on rounding.
        targets = [2 * frames * start + (2 * k + 1) * (end - start) for k in range(frames)]
        seekable = not (by_rank or whole)
        if seekable and (found := on_show(packets, context, targets, 2 * frames, reformatter, size)) is not None:
            times = [float((since - start) * stream.time_base) for _, since in found]
            return Clip(torch.stack([picture for picture, _ in found]), torch.tensor(times, dtype=torch.float32))
        for frame, since, until in _shown(packets, by_rank, start, step):
            picture = None
            while len(picked) < frames:
                if until is not None and targets[len(picked)] >= 2 * frames * until:
                    break
                if picture is None:
                    picture = picture_of(frame, reformatter, size, picked[0] if picked else None)
                picked.append(picture)
                times.append(float((since - start) * stream.time_base))
            if len(picked) == frames:
                break
        if not picked:
            raise MediaError(name, "no frame can be decoded; the file is truncated or damaged")
    return Clip(torch.stack(picked), torch.tensor(times, dtype=torch.float32))


def load_audio(source: Source, sample_rate: int = 16_000) -> Tensor:
    """Decodes sound, of a sound file or of a video, to (samples,) float32 at `sample_rate` Hz, mono.

    Channels are averaged. Integer samples are scaled to [-1, 1]; floating-point ones stay as they are.
    Resampling is torchaudio's, with the ratio of the rates rounded to one whose denominator is at most 1000
    (exact for all customary rates, else off by at most 0.1%, for a small filter).

    Raises:
        MediaError: see the top of the file; also a file without a sound track, without samples, with values
            that are not finite, or with a rate outside `SAMPLE_RATES`.
    """
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise ValueError(f"sample_rate must be within {SAMPLE_RATES[0]} .. {SAMPLE_RATES[1]}, not {sample_rate}")
    with _opened(source, "audio") as (name, file):
        sound, rate = _read_audio(name, file)
    if sound.numel() == 0:
        raise MediaError(name, "holds no samples")
    if not torch.isfinite(sound).all():
        raise MediaError(name, "holds samples that are not finite")
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise MediaError(name, f"declares a sample rate of {rate} Hz")
    if rate == sample_rate:
        return sound
    ratio = _ratio(rate, sample_rate)
    return _resampler(ratio.numerator, ratio.denominator)(sound)


def image_size(source: Source) -> tuple[int, int]:
    """Width and height of an image in pixels, as stored (EXIF may turn it), from its header alone.

    Raises:
        MediaError: see the top of the file; damage behind the header goes unseen.
    """
    with _opened(source, "image") as (name, file), _open_image(name, file) as image:
        return image.size


def audio_length(source: Source, sample_rate: int = 16_000) -> int:
    """How many samples `load_audio` gives, from the header of what libsndfile reads; anything else is decoded.

    Raises:
        MediaError: see `load_audio`; damage behind the header goes unseen.
    """
    with _opened(source, "audio") as (name, file):
        try:
            with soundfile.SoundFile(_nameless(file)) as reader:
                count, rate = reader.frames, reader.samplerate
        except soundfile.LibsndfileError:
            file.seek(0)
            sound, rate = _read_audio_track(name, file)
            count = len(sound)
        if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
            raise MediaError(name, f"declares a sample rate of {rate} Hz")
    ratio = _ratio(rate, sample_rate)
    return -(-count * ratio.denominator // ratio.numerator)


@contextmanager
def _opened(source: Any, kind: str) -> Iterator[tuple[str, BinaryIO]]:
    """The source's name for errors, and a seekable binary file at its start that holds something."""
    try:
        with _file(source, kind) as (name, file):
            yield name, _checked(file, name)
    except MediaError as error:
        error.source = source
        raise


@contextmanager
def _file(source: Any, kind: str) -> Iterator[tuple[str, BinaryIO]]:
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        try:
            mode = Path(name).stat().st_mode if name else None
        except (OSError, ValueError) as error:
            raise MediaError(name, f"cannot open: {getattr(error, 'strerror', None) or error}") from None
        if mode is None or not stat.S_ISREG(mode):
            found = "an empty path" if mode is None else "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise MediaError(name, f"is {found}, not a file of {kind}")
        try:
            file = Path(name).open("rb")  # noqa: SIM115
        except OSError as error:
            raise MediaError(name, f"cannot open: {error.strerror}") from None
        with file:
            yield name, file
    elif isinstance(source, bytes | bytearray | memoryview):
        name = f"<{kind} of {len(source)} bytes>"
        yield name, io.BytesIO(source)
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", f"<{kind} stream>"))
        if not (hasattr(source, "seekable") and source.seekable()):
            content = source.read()
            if not isinstance(content, bytes):
                raise MediaError(name, "must be opened in binary mode")
            source = io.BytesIO(content)
        elif isinstance(source, io.TextIOBase):
            raise MediaError(name, "must be opened in binary mode")
        yield name, source
    else:
        raise TypeError(f"{kind}: expected a path, bytes or a binary file, not {type(source).__name__}")


def _checked(file: BinaryIO, name: str) -> BinaryIO:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size == 0:
        raise MediaError(name, "is empty")
    # libsndfile and libav read a RIFF (WAV, AVI, WebP) or AIFF file that was cut short without a word. Sizes
    # near the limit are what writers to a pipe put there.
    header = file.read(8)
    file.seek(0)
    order = {b"RIFF": "<I", b"FORM": ">I"}.get(header[:4])
    if order is not None and len(header) == 8:
        declared = struct.unpack(order, header[4:])[0] + 8
        if size + 1 < declared < 0x7FFF0000:
            raise MediaError(name, f"is truncated: its header declares {declared} bytes and {size} are there")
    return file


def _nameless(file: BinaryIO) -> Any:
    """The file without its name, from which libav and libsndfile would guess a format."""
    return SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)


@lru_cache(maxsize=1)
def _image_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _IMAGE_FORMATS if name in Image.OPEN)


def _open_image(name: str, file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_image_formats())
    except Image.UnidentifiedImageError:
        raise MediaError(name, "not an image in a format that is read here") from None
    # On damaged data Pillow raises nearly anything: OSError, SyntaxError, IndexError, struct.error.
    except Exception as error:
        raise MediaError(name, f"cannot decode the image: {error}") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or width * height == 0:
        raise MediaError(name, f"an image of {width} x {height} pixels; the limit is {MAX_PIXELS} pixels")
    try:
        image.load()
        flat = _flatten(image, name)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(name, f"cannot decode the image: {error}") from error
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # what a broken EXIF block raises depends on where it is broken
        orientation = 1
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return flat if method is None else flat.transpose(method)


def _flatten(image: Image.Image, name: str) -> Image.Image:
    """RGB of a loaded image of any mode, as a new image."""
    if image.mode == "F":
        raise MediaError(name, "an image of floating-point values has no fixed range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise MediaError(name, "an image of 32-bit values has no fixed range; convert it to 8 or 16 bits")
        eight = ((grey.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            eight[grey == transparent] = 255
        return Image.fromarray(eight).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _demuxed(name: str, file: BinaryIO, kind: str) -> Iterator[tuple[Any, list[av.Packet]]]:
    """The first video or audio stream, its decoder ready, and its packets, last the one that drains it."""
    try:
        with cast(
            InputContainer, av.open(_nameless(file), options=_LIBAV_OPTIONS, metadata_errors="replace")
        ) as container:
            tracks = container.streams.video if kind == "video" else container.streams.audio
            streams = [track for track in tracks if not track.disposition & Disposition.attached_pic]
            if not streams:
                raise MediaError(name, f"has no {'picture' if kind == 'video' else 'sound'} track")
            stream = streams[0]
            if stream.codec_context is None:
                raise MediaError(name, f"its {kind} is in an unknown codec")
            stream.codec_context.thread_count = 1  # threads cost more than they give on short clips
            packets: list[av.Packet] = []
            latest = Fraction(0)
            for packet in container.demux():
                if packet.stream.index == stream.index:
                    packets.append(packet)
                if packet.pts is not None and packet.time_base:
                    latest = max(latest, (packet.pts + (packet.duration or 0)) * packet.time_base)
            # A cut Matroska file ends like a whole one. The tolerance is for headers that are roughly right.
            if container.format.name.split(",")[0] in _TIMED_CONTAINERS and container.duration is not None:
                declared = Fraction(container.duration, av.time_base)
                if declared - latest > max(Fraction(1, 2), declared / 10):
                    found = f"declares {float(declared):.2f} s and ends at {float(latest):.2f} s"
                    raise MediaError(name, f"is truncated: it {found}")
            yield stream, packets
    except ArgumentError:
        raise MediaError(name, f"not a file of {kind} in a container that is read here") from None
    except FFmpegError as error:
        reason = f"truncated, damaged, or not a file of {kind} ({error.strerror})"
        raise MediaError(name, reason) from error


def _timing(packets: list[av.Packet], container: str) -> tuple[int, int, int, list[int]]:
    """When the first frame begins and the last one ends, their customary distance, and the times at which they
    begin where the frames' own do not tell (else none); in units of the stream's time base."""
    framed = [packet for packet in packets if packet.size and not packet.is_discard]
    stamps = [stamp for p in framed if (stamp := p.pts if p.pts is not None else p.dts) is not None]
    if not stamps:
        return 0, 0, 1, []
    start, last, step = min(stamps), max(stamps), 1
    if len(set(stamps)) > 1:
        step = max(1, round((last - start) / (len(set(stamps)) - 1)))
    decoded = [packet.dts for packet in framed if packet.dts is not None]
    if any(after < before for before, after in pairwise(decoded)):  # joined files: time begins anew on the way
        return start, start + len(stamps) * step, step, [start + rank * step for rank in range(len(stamps))]
    shown_last = next(packet for packet in framed if last in (packet.pts, packet.dts))
    # AVI knows no times, and what libav makes up is the order of decoding.
    return start, last + (shown_last.duration or step), step, sorted(stamps) if container == "avi" else []


def _shown(
    packets: list[av.Packet], by_rank: list[int], start: int, step: int
) -> Iterator[tuple[av.VideoFrame, int, int | None]]:
    """Each frame with the time from which it is shown and that at which the next one takes its place.

    Times are those of `by_rank`, in order, as far as it goes, else the frames' own.
    """
    held: tuple[av.VideoFrame, int] | None = None
    for rank, frame in enumerate(frame for packet in packets for frame in packet.decode()):
        if rank < len(by_rank):
            since = by_rank[rank]
        elif frame.pts is not None and (held is None or frame.pts > held[1]):
            since = frame.pts
        else:
            since = start if held is None else held[1] + step
        if held is not None:
            yield *held, since
        held = (frame, since)
    if held is not None:
        yield *held, None


def _read_audio(name: str, file: BinaryIO) -> tuple[Tensor, int]:
    """Mono samples and their rate, from libsndfile where it knows the format and from libav where not."""
    try:
        reader = soundfile.SoundFile(_nameless(file))
    except soundfile.LibsndfileError:
        file.seek(0)
        return _read_audio_track(name, file)
    blocks = []
    try:
        with reader:
            while len(block := reader.read(1 << 18, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
            count, rate = reader.frames, reader.samplerate
    except soundfile.LibsndfileError as error:
        raise MediaError(name, f"truncated or damaged ({error})") from error
    sound = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(sound) < count:
        raise MediaError(name, f"is truncated: it declares {count} samples and holds {len(sound)}")
    return torch.from_numpy(sound), rate


def _read_audio_track(name: str, file: BinaryIO) -> tuple[Tensor, int]:
    with _demuxed(name, file, "audio") as (_, packets):
        blocks: list[np.ndarray] = []
        rate: int | None = None
        resamplers: dict[Any, av.AudioResampler] = {}
        for packet in packets:
            for frame in packet.decode():
                if rate not in (None, frame.sample_rate):
                    raise MediaError(name, f"changes its sample rate from {rate} to {frame.sample_rate} Hz")
                rate = frame.sample_rate
                # One for each layout, since some streams go from mono to stereo on the way; it only converts
                # the sample format, so it holds nothing back.
                key = (frame.format.name, frame.layout.name)
                resampler = resamplers.setdefault(key, av.AudioResampler(format="fltp"))
                blocks.extend(part.to_ndarray().mean(axis=0) for part in resampler.resample(frame))
    if rate is None:
        raise MediaError(name, "no sound can be decoded; the file is truncated or damaged")
    return torch.from_numpy(np.concatenate(blocks)), rate


def _ratio(rate: int, sample_rate: int) -> Fraction:
    return Fraction(rate, sample_rate).limit_denominator(1_000)


@lru_cache(maxsize=32)
def _resampler(numerator: int, denominator: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(numerator, denominator)
