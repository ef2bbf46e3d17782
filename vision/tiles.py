"""Images and frames to tiles, as the released Llama 3.2 Vision prepares them (section 7.2 of the paper: up to four
tiles, arranged for the aspect ratio). Runs in loader workers and holds no parameters.

Tiles stay uint8 until the encoder normalises them: a quarter of the bytes to move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..data.media import Clip, image_size, load_image, load_video


class Arrangement(NamedTuple):
    """How a picture is cut: rows and columns of tiles, and the height and width in pixels to which it is resized
    before it is padded on the right and below."""

    rows: int
    columns: int
    height: int
    width: int


@lru_cache
def canvases(max_tiles: int) -> list[tuple[int, int]]:
    """All (rows, columns) of at most `max_tiles` tiles, in the order of the release's aspect ratio ids 1, 2, ..."""
    return [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]


def canvas_numbers(rows: Tensor, columns: Tensor, max_tiles: int) -> Tensor:
    """The numbers of canvases among `canvases`, counted from 1; all int64 of one shape, on one device."""
    widest = max_tiles // torch.arange(1, max_tiles + 1, device=rows.device)
    return (widest.cumsum(0) - widest)[rows - 1] + columns


@lru_cache(maxsize=4096)
def arrange(height: int, width: int, tile_size: int, max_tiles: int) -> Arrangement:
    """The canvas for a picture: that of the smallest enlargement that fits it, else of the least reduction; the
    smaller one of equals. On it, no side is enlarged beyond one tile or the picture's own size, and the aspect
    ratio is kept, but for sides that would vanish (the release crashes there; 1 pixel is kept).

    Args:
        height, width: of the picture, in pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width} x {height} pixels cannot be cut into tiles")
    options = canvases(max_tiles)
    scales = [min(c * tile_size / width, r * tile_size / height) for r, c in options]
    fitting = [scale for scale in scales if scale >= 1]
    best = min(fitting) if fitting else max(scales)
    rows, columns = min(
        (option for option, scale in zip(options, scales, strict=True) if scale == best),
        key=lambda option: option[0] * option[1],
    )
    target_height = min(max(height, tile_size), rows * tile_size)
    target_width = min(max(width, tile_size), columns * tile_size)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        fitted = min(max(math.floor(height * scale_width), 1), target_height)
        return Arrangement(rows, columns, fitted, target_width)
    fitted = min(max(math.floor(width * scale_height), 1), target_width)
    return Arrangement(rows, columns, target_height, fitted)


@dataclass(frozen=True, kw_only=True)
class ImagePreparation:
    """Pictures to tiles; implements `herdkit.adapters.contract.Preparation`.

    Args:
        tile_size: side of a tile in pixels.
        max_tiles: tiles of a picture at most.
    """

    tile_size: int
    max_tiles: int = 4

    def load(self, source: Any) -> Image.Image:
        """An RGB picture from a path, bytes, a file object or a picture.

        Raises:
            MediaError: the source is missing, empty, truncated or no image.
        """
        return load_image(source)

    def size(self, source: Any) -> int:
        """Tiles of what `load` takes; of a file from its header."""
        width, height = source.size if isinstance(source, Image.Image) else image_size(source)
        plan = arrange(height, width, self.tile_size, self.max_tiles)
        return plan.rows * plan.columns

    def positions(self, item: Image.Image) -> int:
        return 1

    def __call__(self, items: Sequence[Image.Image]) -> dict[str, Tensor]:
        """N RGB pictures to `tiles` (N, T, 3, tile_size, tile_size) uint8, row by row and padded with zeros, T the
        largest number of tiles among them; `n_tiles` (N,) int64; `grid` (N, 2) int64, rows and columns."""
        s = self.tile_size
        plans = [arrange(image.height, image.width, s, self.max_tiles) for image in items]
        n_tiles = [plan.rows * plan.columns for plan in plans]
        tiles = np.zeros((len(items), max(n_tiles), 3, s, s), np.uint8)
        for image, plan, out in zip(items, plans, tiles, strict=True):
            rows, columns, height, width = plan
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            canvas = pixels = np.asarray(image)
            if (height, width) != (rows * s, columns * s):
                canvas = np.zeros((rows * s, columns * s, 3), np.uint8)
                canvas[:height, :width] = pixels
            cut = canvas.reshape(rows, s, columns, s, 3).transpose(0, 2, 4, 1, 3)
            out[: rows * columns] = cut.reshape(-1, 3, s, s)
        return {
            "tiles": torch.from_numpy(tiles),
            "n_tiles": torch.tensor(n_tiles),
            "grid": torch.tensor([plan[:2] for plan in plans]),
        }


@dataclass(frozen=True, kw_only=True)
class VideoPreparation:
    """Clips to the tiles of uniformly sampled frames (section 7.2); implements `Preparation`.

    Args:
        frames: frames of a clip.
        tile_size: side of a tile in pixels.
        max_tiles: tiles of a frame at most; the paper pre-trains on four.
    """

    frames: int
    tile_size: int
    max_tiles: int = 1

    def load(self, source: Any) -> Clip:
        """`frames` frames of a video, no side longer than the longest canvas.

        Raises:
            MediaError: the source is missing, empty, truncated or no video.
        """
        return load_video(source, self.frames, size=self.max_tiles * self.tile_size)

    def size(self, source: Any) -> int:
        """The most tiles that a clip can have."""
        return self.frames * self.max_tiles

    def positions(self, item: Clip) -> int:
        return 1

    def __call__(self, items: Sequence[Clip]) -> dict[str, Tensor]:
        """N clips to `tiles` (N, frames, T, 3, tile_size, tile_size) uint8, `n_tiles` (N,) int64 and `grid` (N, 2)
        int64 of every frame of a clip.

        Raises:
            ValueError: a clip has another number of frames.
        """
        s = self.tile_size
        plans = []
        for clip in items:
            count, _, height, width = clip.frames.shape
            if count != self.frames:
                raise ValueError(f"a clip of {count} frames, but the video adapter takes {self.frames}")
            plans.append(arrange(height, width, s, self.max_tiles))
        n_tiles = [plan.rows * plan.columns for plan in plans]
        tiles = torch.zeros(len(items), self.frames, max(n_tiles), 3, s, s, dtype=torch.uint8)
        for clip, (rows, columns, height, width), out in zip(items, plans, tiles, strict=True):
            canvas = clip.frames
            if canvas.shape[2:] != (height, width):
                canvas = F.interpolate(canvas, (height, width), mode="bilinear", antialias=True)
            canvas = F.pad(canvas, (0, columns * s - width, 0, rows * s - height))
            cut = canvas.view(self.frames, 3, rows, s, columns, s).permute(0, 2, 4, 1, 3, 5)
            out[:, : rows * columns] = cut.flatten(1, 2)
        return {
            "tiles": tiles,
            "n_tiles": torch.tensor(n_tiles),
            "grid": torch.tensor([plan[:2] for plan in plans]),
        }
