"""Context parallelism in the paper's form (section 3.3.2): a row is cut into 2 x C chunks, of which process i has
chunks i and 2C - 1 - i, so that all have the same work under a causal mask. Keys and values are gathered from all
processes before the attention, which makes any mask possible, that of documents too."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..train.place import Place
from .attention import Arrangement, attend
from .model import Shared, Transformer, document_positions, rotary_turns
from .rows import TokenBatch


def own_chunks(x: Tensor, place: Place) -> Tensor:
    """The positions of this process, (B, T, ...) to (B, T / C, ...)."""
    if place.layout.context == 1:
        return x
    last = 2 * place.layout.context - 1
    chunks = x.unflatten(1, (last + 1, -1))
    return torch.cat([chunks[:, place.at.context], chunks[:, last - place.at.context]], dim=1)


def own_positions(batch: TokenBatch, place: Place) -> TokenBatch:
    """A batch with this process's tokens and labels. The documents stay those of whole rows: `share_context` needs all
    of them to know what the process's positions see."""
    if place.layout.context == 1:
        return batch
    return dataclasses.replace(batch, tokens=own_chunks(batch.tokens, place), labels=own_chunks(batch.labels, place))


def share_context(model: Transformer, place: Place) -> None:
    """Makes `model.hidden` one of this process's positions: its tokens (or embeddings) are (B, T / C, ...), `positions`
    and `documents` are those of whole rows (B, T)."""

    def shared(
        length: int, device: torch.device, positions: Tensor | None, documents: Tensor | None, cache: Any
    ) -> Shared:
        if cache is not None:
            raise ValueError("a model that shares rows with other processes (parallel.context) cannot decode")
        T = length * place.layout.context
        if model.config.max_seq_len < T:
            raise ValueError(f"a row of {T} tokens is longer than max_seq_len ({model.config.max_seq_len})")
        if positions is None:
            steps = torch.arange(T, device=device)[None]
            positions = steps if documents is None else document_positions(documents)
        turns = rotary_turns(model.config, own_chunks(positions, place))
        return Shared(turns, GatheredRows.of(place, T, documents, device))

    model.shared = shared  # type: ignore[method-assign]


@dataclass
class GatheredRows(Arrangement):
    """What this process's positions see: keys and values of all processes.

    Args:
        group: the processes that share a row.
        order: for each chunk of a row, where it stands among those gathered, (2 x C,) int64.
        ends: where each of the two chunks of this process ends in the row.
        sees: for each of them, which of the positions up to there it sees.
    """

    group: dist.ProcessGroup
    order: Tensor
    ends: tuple[int, int]
    sees: tuple[Tensor | BlockMask, Tensor | BlockMask]

    @classmethod
    def of(cls, place: Place, length: int, documents: Tensor | None, device: torch.device) -> GatheredRows:
        C, last, group = place.layout.context, 2 * place.layout.context - 1, place.group("context")
        assert group is not None
        gathered = torch.tensor([chunk for i in range(C) for chunk in (i, last - i)], device=device)
        width = length // (2 * C)
        ends = ((place.at.context + 1) * width, (last - place.at.context + 1) * width)
        sees = _sees(width, ends[0], documents, device), _sees(width, ends[1], documents, device)
        return cls(group, gathered.argsort(), ends, sees)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._gather(k), self._gather(v)
        parts = zip(q.chunk(2, dim=1), self.ends, self.sees, strict=True)
        return torch.cat([attend(own, k[:, :end], v[:, :end], sees) for own, end, sees in parts], dim=1)

    def _gather(self, x: Tensor) -> Tensor:
        chunks = all_gather_tensor_autograd(x.contiguous(), 1, self.group).unflatten(1, (len(self.order), -1))
        return chunks.index_select(1, self.order).flatten(1, 2)


def _sees(width: int, end: int, documents: Tensor | None, device: torch.device) -> Tensor | BlockMask:
    """What positions `end - width` to `end - 1` see of positions 0 to `end - 1`."""
    if device.type != "cpu":

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = query + (end - width)
            return (at >= key) if documents is None else (at >= key) & (documents[b, at] == documents[b, key])

        rows = None if documents is None else documents.shape[0]
        return create_block_mask(visible, rows, None, width, end, device=str(device))
    steps = torch.arange(end)
    sees = (steps[end - width :, None] >= steps)[None]
    if documents is not None:
        sees = sees & (documents[:, end - width : end, None] == documents[:, None, :end])
    return sees[:, None]
