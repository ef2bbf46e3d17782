"""Pictures of what samples hold: images side by side, clips as rows of frames, sound as spectrograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torchaudio
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from .media import MediaError, load_audio, load_image, load_video
from .media_check import kind_of
from .shards import Sample
from .wording import byte_size, printable

FRAMES = 8
SAMPLE_RATE = 16_000

_INK, _QUIET, _WRONG, _LINE, _PAPER, _BLANK = "#1c2430", "#667085", "#b3261e", "#d0d5dd", "#ffffff", "#f2f4f7"
_GAP = 16
_SEAM = 4
_AXES = (36, 24)
"""Pixels left and right of a spectrogram, for the labels of its axes."""
_TEXT_LINE = 18
_BANDS = 80
_HIGHEST = 8000


@dataclass
class Tile:
    """One picture of a sheet.

    Args:
        title: the key of its sample.
        picture: at most as large as the sheet's box; None where the member is damaged.
        facts: what is said beside the title, or below it where that leaves no room.
        caption: lines below that.
        problem: why there is no picture.
    """

    title: str
    picture: Image.Image | None = None
    facts: str = ""
    caption: list[str] = field(default_factory=list)
    problem: str = ""


def sheet(tiles: Sequence[Tile], box: tuple[int, int], columns: int) -> Image.Image:
    """Tiles in reading order on white, each picture at the left and the bottom of a box of (width, height) pixels, its
    words below."""
    columns = min(columns, len(tiles))
    words = [_words(tile, box[0]) for tile in tiles]
    width, height = box[0] + _GAP, box[1] + max(map(len, words)) * _TEXT_LINE + 8 + _GAP
    made = Image.new("RGB", (columns * width + _GAP, -(-len(tiles) // columns) * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(made)
    for number, tile in enumerate(tiles):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        if tile.picture is None:
            draw.rectangle((left, top, left + min(box) - 1, top + box[1] - 1), _BLANK, _LINE)
            draw.text((left + min(box) / 2, top + box[1] / 2), "damaged", _WRONG, _font(13), anchor="mm")
        else:
            made.paste(tile.picture, (left, top + box[1] - tile.picture.height))
        for line, runs in enumerate(words[number]):
            x, y = float(left), top + box[1] + 6 + line * _TEXT_LINE
            for text, colour, font in runs:
                draw.text((x, y), text, colour, font)
                x += font.getlength(text) + 8
    return made


def image_sheet(samples: Iterable[Sample], side: int = 208, columns: int = 5) -> Image.Image | None:
    """The images of samples with their keys and captions (`txt`); None where there are none."""

    def tile(sample: Sample, extension: str) -> Tile:
        picture = load_image(sample.members[extension])
        facts = f"{picture.width} x {picture.height} {extension}"
        return Tile(sample.key, framed(fitted(picture, (side - 2, side - 2))), facts, _caption(sample, 2, side))

    tiles = _tiles(samples, "image", tile)
    return sheet(tiles, (side, _tallest(tiles, side)), columns) if tiles else None


def video_sheet(samples: Iterable[Sample], side: int = 112) -> Image.Image | None:
    """The clips of samples, each a row of `FRAMES` frames from its whole length with their times; None for none."""
    width = FRAMES * (side + _SEAM) - _SEAM

    def tile(sample: Sample, extension: str) -> Tile:
        content = sample.members[extension]
        facts = f"{extension}, {byte_size(len(content))}"
        return Tile(sample.key, film_strip(content, side), facts, _caption(sample, 1, width))

    tiles = _tiles(samples, "video", tile)
    return sheet(tiles, (width, _tallest(tiles, side)), 1) if tiles else None


def audio_sheet(samples: Iterable[Sample], width: int = 960, height: int = 120) -> Image.Image | None:
    """The sound of samples as spectrograms on one scale of time; None where there is none."""
    sounds: list[tuple[Tile, Tensor]] = []

    def tile(sample: Sample, extension: str) -> Tile:
        sound = load_audio(sample.members[extension], SAMPLE_RATE)
        facts = f"{len(sound) / SAMPLE_RATE:.2f} s {extension}"
        sounds.append((Tile(sample.key, None, facts, _caption(sample, 1, width)), sound))
        return sounds[-1][0]

    tiles = _tiles(samples, "audio", tile)
    if not tiles:
        return None
    longest = max((len(sound) for _, sound in sounds), default=SAMPLE_RATE) / SAMPLE_RATE
    scale = min(max((width - sum(_AXES)) / longest, 24.0), 240.0)
    for made, sound in sounds:
        made.picture = spectrogram(sound, scale, height, width)
    return sheet(tiles, (width, _tallest(tiles, height)), 1)


def film_strip(content: bytes, side: int, frames: int = FRAMES) -> Image.Image:
    """Frames of a video beside each other, each at most `side` pixels wide and high, with its time beneath.

    Raises:
        MediaError: it cannot be decoded.
    """
    clip = load_video(content, frames, size=side)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    pictures = [framed(fitted(picture, (side - 2, side - 2))) for picture in pictures]
    width, height = pictures[0].size
    step = max(width, 48) + _SEAM
    made = Image.new("RGB", (frames * step - _SEAM, height + 16), _PAPER)
    draw = ImageDraw.Draw(made)
    for number, (picture, time) in enumerate(zip(pictures, clip.times.tolist(), strict=True)):
        made.paste(picture, (number * step, 0))
        draw.text((number * step + width / 2, height + 9), f"{time:.2f} s", _QUIET, _font(11), anchor="mm")
    return made


def spectrogram(sound: Tensor, scale: float, height: int, width: int) -> Image.Image:
    """Energy in mel bands up to 8 kHz over time, 80 dB from the loudest down, with axes.

    Args:
        sound: (samples,) float32 at `SAMPLE_RATE` Hz.
        scale: pixels of a second. height: of the bands, in pixels.
        width: of the picture at most; what is beyond it is cut off, which a note in the picture says.
    """
    left, right = _AXES
    seconds = len(sound) / SAMPLE_RATE
    shown = min(seconds, (width - left - right) / scale)
    levels = _mel_levels(sound[: int(shown * SAMPLE_RATE)])
    colours = matplotlib.colormaps["magma"]((levels / 80 + 1).clamp(0, 1).numpy(), bytes=True)[::-1, :, :3]
    bands = Image.fromarray(np.ascontiguousarray(colours))
    bands = bands.resize((max(1, round(shown * scale)), height), Image.Resampling.BILINEAR)
    made = Image.new("RGB", (left + bands.width + right, height + 18), _PAPER)
    made.paste(bands, (left, 0))
    draw = ImageDraw.Draw(made)
    for kilohertz in (0.5, 1, 2, 4, 8):
        y = height - height * _mel(1000 * kilohertz) / _mel(_HIGHEST)
        draw.line((left - 4, y, left - 1, y), _QUIET)
        draw.text((left - 6, max(y, 5)), f"{kilohertz:g}k", _QUIET, _font(10), anchor="rm")
    step = next((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10) if step * scale >= 48), 10)
    for number in range(int(shown / step + 1e-6) + 1):
        x = left + number * step * scale
        draw.line((x, height, x, height + 3), _QUIET)
        draw.text((x, height + 11), f"{number * step:g} s", _QUIET, _font(10), anchor="mm")
    if shown < seconds:
        note = f"the first {shown:.0f} of {seconds:.0f} s"
        draw.text((left + bands.width - 4, 8), note, _PAPER, _font(11), anchor="rm")
    return made


def fitted(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    """Shrunk to a box of (width, height), its proportions kept; or enlarged by the largest whole factor that fits."""
    ratio = min(box[0] / picture.width, box[1] / picture.height)
    if ratio >= 1:
        size = (picture.width * int(ratio), picture.height * int(ratio))
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (max(1, int(picture.width * ratio)), max(1, int(picture.height * ratio)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def framed(picture: Image.Image) -> Image.Image:
    """With a thin line around it, so that white ones stand out."""
    return ImageOps.expand(picture, 1, _LINE)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int, keep_end: bool = False) -> str:
    """As much of a text as fits into so many pixels, "…" for the rest."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the most characters that fit
        middle = (low + high + 1) // 2
        part = "…" + text[-middle:] if keep_end else text[:middle] + "…"
        low, high = (middle, high) if font.getlength(part) <= width else (low, middle - 1)
    return "…" + text[len(text) - low :] if keep_end else text[:low] + "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """A text in at most so many lines of so many pixels, cut between words where it can be, "…" for the rest."""
    found: list[str] = []
    while text and len(found) < lines:
        line = text
        while len(found) < lines - 1 and font.getlength(line) > width and " " in line:
            line = line.rpartition(" ")[0]
        found.append(shortened(line, font, width))
        text = text[len(line) :].lstrip()
    return found


def _tiles(samples: Iterable[Sample], kind: str, make: Callable[[Sample, str], Tile]) -> list[Tile]:
    tiles = []
    for sample in samples:
        for extension in sample.members:
            if kind_of(extension) != kind:
                continue
            try:
                tile = make(sample, extension)
            except MediaError as error:
                tile = Tile(sample.key, problem=f"{extension}: {error.reason}")
            tile.title, tile.problem = printable(tile.title), printable(tile.problem)
            tiles.append(tile)
    return tiles


Run = tuple[str, str, ImageFont.FreeTypeFont]
"""Text, its colour and its font."""


def _words(tile: Tile, width: int) -> list[list[Run]]:
    """The lines below a picture."""
    bold, plain = _font(13, bold=True), _font(12)
    title: Run = (shortened(tile.title, bold, width, keep_end=True), _INK, bold)
    if tile.problem:
        return [[title], *([(line, _WRONG, plain)] for line in wrapped(tile.problem, plain, width, 3))]
    facts: Run = (shortened(tile.facts, plain, width), _QUIET, plain)
    beside = bold.getlength(title[0]) + 8 + plain.getlength(facts[0]) <= width
    head = [[title, facts]] if beside else [[title], [facts]]
    return head + [[(line, _INK, plain)] for line in tile.caption]


def _caption(sample: Sample, lines: int, width: int) -> list[str]:
    """The text of a sample in so many lines of that width."""
    try:
        words = printable(" ".join(sample.text("txt").split())) if "txt" in sample.members else ""
    except ValueError:
        return []
    return wrapped(words, _font(12), width, lines)


def _tallest(tiles: Sequence[Tile], otherwise: int) -> int:
    return max((tile.picture.height for tile in tiles if tile.picture is not None), default=otherwise)


def _mel(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


@lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    return torchaudio.functional.melscale_fbanks(513, 0.0, float(_HIGHEST), _BANDS, SAMPLE_RATE)


def _mel_levels(sound: Tensor) -> Tensor:
    """(bands, frames) in dB, at most 0, low bands first."""
    power = torch.stft(
        sound if len(sound) >= 1024 else torch.nn.functional.pad(sound, (0, 1024 - len(sound))),
        1024, 160, 400, torch.hann_window(400), return_complex=True,
    ).abs().square()  # fmt: skip
    levels = 10 * (_mel_filters().T @ power).clamp_min(1e-10).log10()
    return levels - levels.max()


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along and which has most alphabets."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
