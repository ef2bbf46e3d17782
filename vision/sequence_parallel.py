"""Images shared by processes (section 7.3 of "The Llama 3 Herd of Models", arXiv 2407.21783): each runs the encoder for
an equal part of the tokens of a batch, wherever in an image that begins and ends. Keys and values are gathered from all
before the attention, features at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from .encoder import VisionTransformer
from .packed import Groups, Sequences, attend_all


@contextmanager
def share_tokens(encoder: VisionTransformer, group: dist.ProcessGroup) -> Iterator[None]:
    """Meanwhile `encoder.forward`, called on all processes of a group with the same images, gives each the features of
    all. Of the gradient of a weight each process has its own part, whose sum it is."""
    encoder.sequences = lambda groups, mask=None: SharedSequences(groups, mask, group)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del encoder.sequences


@dataclass
class _Piece:
    """Some neighbouring sequences of one length, or a part of a single one, that a process has queries of.

    Args:
        n: sequences, of which `first` is the first; mask rows are counted by it.
        queries: tokens of each that are run here, from the token `offset` of the sequence on.
        start, length: of their keys among all tokens, and how many each has.
    """

    n: int
    first: int
    queries: int
    offset: int
    start: int
    length: int


class SharedSequences(Sequences):
    """This process's part of the tokens. Where they do not come out even, the last token is run more than once, and
    used once: a process without any could not take part in the backward pass."""

    def __init__(self, groups: Groups, mask: Tensor | None, group: dist.ProcessGroup):
        super().__init__(groups, mask)
        self.group = group
        self.total = sum(n * length for n, length in groups)
        share = -(-self.total // dist.get_world_size(group))
        first = dist.get_rank(group) * share
        self.tokens = range(first, first + share)
        self.pieces = list(_pieces(groups, self.tokens, self.total))

    def own(self, x: Tensor) -> Tensor:
        part = x[self.tokens.start : self.tokens.stop]
        return torch.cat([part, x[-1:].expand(len(self.tokens) - len(part), *x.shape[1:])])

    def whole(self, x: Tensor) -> Tensor:
        # All processes read all features: their gradients add up in float32 (section 3.3.2).
        return self._gather(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._gather(torch.stack((k, v), dim=1)).unbind(1)
        parts = []
        for own, piece in zip(q.split([piece.n * piece.queries for piece in self.pieces]), self.pieces, strict=True):
            keys = slice(piece.start, piece.start + piece.n * piece.length)
            parts.append(attend_all(own, k[keys], v[keys], piece.n, self._mask(piece)))
        return torch.cat(parts)

    def _mask(self, piece: _Piece) -> Tensor | None:
        if self.mask is None:
            return None
        rows = torch.arange(piece.offset, piece.offset + piece.queries, device=self.mask.device)
        return self.mask[piece.first : piece.first + piece.n, :, rows.clamp(max=piece.length - 1)]

    def _gather(self, x: Tensor) -> Tensor:
        return all_gather_tensor_autograd(x.contiguous(), 0, self.group)[: self.total]


def _pieces(groups: Groups, tokens: range, total: int) -> Iterator[_Piece]:
    """What the tokens of a process are, in their order; those after `total` are the last token again."""
    number = start = 0
    for n, length in groups:
        whole: _Piece | None = None
        for _ in range(n):
            end = tokens.stop if start + length == total else start + length
            queries = min(end, tokens.stop) - max(start, tokens.start)
            if queries == length and start >= tokens.start:
                whole = whole or _Piece(0, number, length, 0, start, length)
                whole.n += 1
            elif queries > 0:
                if whole is not None:
                    yield whole
                    whole = None
                yield _Piece(1, number, queries, max(tokens.start - start, 0), start, length)
            number, start = number + 1, start + length
        if whole is not None:
            yield whole
