"""Utterances of different lengths without the padding between them: what works frame by frame (linear layers, norms) is
run on the frames that are there, and only attention and convolution see padded rows.

In a batch of recordings as they come, half of all places may be padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Frames:
    """Which places of N padded rows of T hold the M frames of N utterances.

    Attributes:
        valid: (N, T) bool, True where a frame is.
    """

    def __init__(self, lengths: Tensor, size: int):
        """`lengths`: (N,) int64, at most `size`, T."""
        self.valid = torch.arange(size, device=lengths.device) < lengths[:, None]
        places = self.valid.flatten().nonzero()[:, 0]
        self.places = None if len(places) == self.valid.numel() else places

    def pack(self, padded: Tensor) -> Tensor:
        """(N, T, ...) to (M, ...), one utterance after another."""
        flat = padded.flatten(0, 1)
        return flat if self.places is None else _moved(flat, self.places, len(flat), False)

    def pad(self, packed: Tensor) -> Tensor:
        """Back to (N, T, ...), with zeros where no frame is."""
        if self.places is not None:
            packed = _moved(packed, self.places, self.valid.numel(), True)
        return packed.unflatten(0, self.valid.shape)


def _moved(x: Tensor, places: Tensor, size: int, to_padded: bool) -> Tensor:
    return _Move.apply(x, places, size, to_padded)  # type: ignore[return-value]


class _Move(torch.autograd.Function):
    """Each way is the other's gradient; the ones that autograd would take add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int, to_padded: bool) -> Tensor:
        ctx.arguments = places, size, to_padded
        return _move(x, places, size, to_padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        places, size, to_padded = ctx.arguments
        return _move(gradients[0], places, size, not to_padded), None, None, None


def _move(x: Tensor, places: Tensor, size: int, to_padded: bool) -> Tensor:
    if not to_padded:
        return x.index_select(0, places)
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)
