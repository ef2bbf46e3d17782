"""The interface of every image encoder, the packing that lets padded tiles cost nothing, and attention within it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from ..text.attention import dot_product_attention


class Encoder(nn.Module, ABC):
    """What image and video adapters and the contrastive stage ask of an image encoder.

    Letters in shapes: N images, T tiles of an image, s tile side in pixels, L tokens of a tile, V real tiles of
    the whole batch.

    Attributes:
        image_size: tile side s in pixels.
        max_tiles: tiles of an image at most.
        width: channels of the features of `forward`.
        pooled_width: channels of the result of `pooled`.
        mean, std: normalisation of the three colours, for values in [0, 1].
    """

    image_size: int
    max_tiles: int
    width: int
    pooled_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def forward(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, T', L, width) and their mask (N, T' * L) bool, True where the tile is real; T' <= T, at
        least the largest number of tiles in the batch. Features of padded tiles mean nothing.

        Args:
            tiles: (N, T, 3, s, s), row by row, padded on the right; uint8, or float that is already normalised.
            n_tiles: (N,) int64, how many of the T are real, at least 1.
            grid: (N, 2) int64, rows and columns of tiles.
        """

    @abstractmethod
    def pooled(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> Tensor:
        """One vector for each image, (N, pooled_width), for contrastive training; arguments as in `forward`."""

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 pixels (..., 3, s, s) to float32 of mean 0 and deviation 1; float tiles as they are."""
        if tiles.dtype != torch.uint8:
            return tiles
        mean, std = torch.tensor([self.mean, self.std], device=tiles.device)[..., None, None]
        return torch.addcmul(-mean / std, tiles.float(), 1 / (255 * std))


class PackedTiles:
    """The real tiles of a batch without the padded ones, images with equal numbers of tiles side by side. Every
    token-wise operation then runs on real tokens only, and attention runs unmasked on each group, so that
    padding can neither cost time nor leak.

    Reads `n_tiles` on the host, one synchronisation on a GPU; none where T is 1.

    Args:
        n_tiles: (N,) int64.
        capacity: T, tiles of the padded tensors.

    Attributes:
        groups: (images, tiles of each) in the order of packing.
        image: (V,) int64, which image a packed tile is of; tile: (V,) int64, which of its tiles.
        tiles: T', the largest number of tiles of an image.

    Raises:
        ValueError: an image has no tile, or more than `capacity`.
    """

    def __init__(self, n_tiles: Tensor, capacity: int):
        N = n_tiles.shape[0]
        self.n_images = N
        counts = [1] * N if capacity == 1 else n_tiles.tolist()
        if min(counts) < 1 or max(counts) > capacity:
            raise ValueError(f"n_tiles must be within 1 and {capacity}, the tiles that were given, not {counts}")
        order = sorted(range(N), key=counts.__getitem__)
        self.groups = [(len(list(same)), count) for count, same in groupby(counts[i] for i in order)]
        self.tiles = max(counts)
        self._whole = len(self.groups) == 1
        pairs = [(i, t) for i in order for t in range(counts[i])]
        self.image, self.tile = torch.tensor(pairs, device=n_tiles.device).unbind(1)

    def pack(self, x: Tensor) -> Tensor:
        """(N, T, ...) to (V, ...)."""
        if self._whole:
            return x[:, : self.tiles].flatten(0, 1)
        return x[self.image, self.tile]

    def unpack(self, x: Tensor) -> Tensor:
        """(V, ...) to (N, T', ...), zeros where there is no tile."""
        if self._whole:
            return x.unflatten(0, (self.n_images, self.tiles))
        return x.new_zeros(self.n_images, self.tiles, *x.shape[1:]).index_put((self.image, self.tile), x)

    def mean(self, x: Tensor) -> Tensor:
        """The average over the tiles of each image, (V, C) to (N, C)."""
        if self.tiles == 1:
            return x
        counts = torch.bincount(self.image, minlength=self.n_images)
        total = x.new_zeros(self.n_images, x.shape[1]).index_add(0, self.image, x)
        return total / counts[:, None].to(x.dtype)

    def token_mask(self, tokens: int) -> Tensor:
        """(N, T' * tokens) bool, True for tokens of real tiles."""
        real = torch.zeros(self.n_images, self.tiles, dtype=torch.bool, device=self.image.device)
        real[self.image, self.tile] = True
        return real.repeat_interleave(tokens, dim=1)


Groups = list[tuple[int, int]]
"""(images, tokens of each), in the order of packing."""


@dataclass
class Sequences:
    """How the tokens of packed images are cut into sequences for attention, and which of them are run here: all.
    `herdkit.vision.sequence_parallel` divides them among processes.

    Args:
        groups: of the sequences.
        mask: bool, True where a query (last but one) may see a key (last), broadcast over sequences and heads; only
            with a single group.
    """

    groups: Groups
    mask: Tensor | None = None

    def own(self, x: Tensor) -> Tensor:
        """Of (S, ...) what is run here."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """From what is run here to (S, ...)."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within each sequence, of the tokens that are run here; (S, H, Dh) each, and out."""
        sizes = [n * length for n, length in self.groups]
        groups = zip(self.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        parts = [attend_all(q, k, v, n, self.mask) for (n, _), q, k, v in groups]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def attend_all(q: Tensor, k: Tensor, v: Tensor, n: int, mask: Tensor | None) -> Tensor:
    """Attention of n sequences of equal length that stand one after the other, (n * L, H, Dh) each, and out."""
    q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (q, k, v))
    return dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)
