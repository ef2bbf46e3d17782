"""Draws made scenes and clips as pixels: antialiased shapes on a slightly uneven ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .clips import MovingScene
from .scenes import SIDE, Scene, SceneObject
from .words import COLOURS

_SUPERSAMPLE = 4
_CELL = SIDE / 3
_RADIUS = {"big": 14.5, "small": 9.0}
"""Pixels from the centre to the far edge: 29 and 18 pixels across, in cells of 32."""
_PATCH = 40
_WORD_HEIGHT = 26


Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two are the first pixels beyond."""


def draw_scene(scene: Scene, rng: Random, boxes: list[Box] | None = None) -> Image.Image:
    """RGB picture of `scene.size`. `rng` chooses what no question asks for: ground, tint, jitter of place.

    Args:
        boxes: takes the box of each object, in order.
    """
    width, height = scene.size
    picture, dark = _ground(width, height, rng)
    for one in scene.objects:
        x, y = (
            _middle(cell, length, rng) + rng.uniform(-2.4, 2.4)
            for cell, length in ((one.column, width), (one.row, height))
        )
        mask = _mask(one, x, y, _scale(rng))
        _paste(picture, mask, _tint(one.colour, rng))
        if boxes is not None:
            left, top, right, bottom = mask[2].getbbox() or (0, 0, 0, 0)
            right, bottom = min(mask[0] + right, width), min(mask[1] + bottom, height)
            boxes.append((max(mask[0] + left, 0), max(mask[1] + top, 0), right, bottom))
    if scene.word is not None:
        y = (scene.word_row + 0.5) * height / 3 + rng.uniform(-1.5, 1.5)
        x = width / 2 + rng.uniform(-3, 3)
        ink = (235, 235, 235) if dark else (20, 20, 20)
        ImageDraw.Draw(picture).text((x, y), scene.word, fill=ink, font=_font(), anchor="mm")
    return picture


def _middle(cell: int, length: int, rng: Random) -> float:
    """The middle of one of the squares that a cell of the grid holds along an axis of `length` pixels."""
    squares = length // SIDE
    return (cell * squares + rng.randrange(squares) + 0.5) * _CELL


def draw_clip(clip: MovingScene, frames: int, rng: Random, size: int = SIDE) -> list[np.ndarray]:
    """`frames` pictures over the whole clip, each (size, size, 3) uint8; the ground stays the same."""
    ground, _ = _ground(size, size, rng)
    tints = [_tint(o.colour, rng) for o in clip.objects]
    scales = [_scale(rng) for _ in clip.objects]
    jitters = [(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)) for _ in clip.objects]
    masks: dict[tuple[int, float, float], _Mask] = {}  # most objects stand still in most frames
    drawn = []
    for number in range(frames):
        time = number / max(frames - 1, 1)
        picture = ground.copy()
        for i, (column, row) in enumerate(clip.positions(time)):
            x, y = ((cell + 0.5) * size / 3 + shift for cell, shift in zip((column, row), jitters[i], strict=True))
            if (i, x, y) not in masks:
                masks[i, x, y] = _mask(clip.objects[i], x, y, scales[i])
            _paste(picture, masks[i, x, y], tints[i])
        drawn.append(np.asarray(picture))
    return drawn


def _ground(width: int, height: int, rng: Random) -> tuple[Image.Image, bool]:
    """Dark or light, near grey, uneven by a few levels; and whether it is dark."""
    dark = rng.random() < 0.5
    level = rng.uniform(8, 60) if dark else rng.uniform(195, 240)
    noise = np.random.default_rng(rng.getrandbits(64))
    coarse = level + noise.uniform(-7, 7, 3) + noise.normal(0, 5, (height // 8, width // 8, 1))
    small = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR), dark


def _tint(colour: str, rng: Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in COLOURS[colour])
    return red, green, blue


def _scale(rng: Random) -> float:
    return rng.uniform(0.94, 1.06)


_Mask = tuple[int, int, Image.Image]
"""Left and top of a patch of the picture, and how much of each of its pixels is covered."""


def _mask(one: SceneObject, x: float, y: float, scale: float) -> _Mask:
    """The antialiased shape with its centre at (x, y) pixels."""
    left, top = math.floor(x - _PATCH / 2), math.floor(y - _PATCH / 2)
    radius = _RADIUS[one.size] * scale * _SUPERSAMPLE
    centre = np.array([x - left, y - top]) * _SUPERSAMPLE
    mask = Image.new("L", (_PATCH * _SUPERSAMPLE, _PATCH * _SUPERSAMPLE))
    pen = ImageDraw.Draw(mask)
    if one.shape == "circle":
        pen.ellipse([*(centre - radius), *(centre + radius)], fill=255)
    else:
        pen.polygon((centre + radius * _outline(one.shape)).ravel().tolist(), fill=255)
    return left, top, mask.reduce(_SUPERSAMPLE)


def _paste(picture: Image.Image, mask: _Mask, colour: tuple[int, int, int]) -> None:
    left, top, coverage = mask
    picture.paste(colour, (left, top), coverage)


@cache
def _outline(shape: str) -> np.ndarray:
    """Corners (corners, 2) within about the unit circle; y points down."""
    return np.array(_corners(shape))


def _corners(shape: str) -> Sequence[tuple[float, float]]:
    if shape == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85))
    if shape == "cross":
        arm = 0.33
        return (
            *((-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)),
            *((arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm)),
        )
    if shape == "star":
        corners = []
        for i in range(10):
            radius, angle = (1.1, 0.42)[i % 2], math.pi * i / 5
            corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
        return corners
    if shape == "heart":
        turns = [2 * math.pi * i / 48 for i in range(48)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15,
            )
            for t in turns
        ]
    raise ValueError(f"no outline for the shape {shape!r}")


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_WORD_HEIGHT)
