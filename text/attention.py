"""Attention of the language model: which kernel answers which question.

Rows of one document, and prompts, are plainly causal. Decoding sees the slots of a cache by a mask. Rows of packed
documents (section 3.2) see only their own document, and a mask for that would cost the whole square of a row: on a GPU
a block mask leaves out what no position sees, on a CPU the documents are laid side by side as rows of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..train.precision import cpu_has


class Arrangement(ABC):
    """Keys and values are brought elsewhere before the attention."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the function `attend`."""


@dataclass
class DocumentRows(Arrangement):
    """The documents of B packed rows of T positions as groups of rows, each group as wide as its longest document,
    which is less than twice its shortest.

    Args:
        shapes: (rows, width) of every group.
        index: for each position of the groups, one after another: which of the B * T positions stands there, int64.
        padding: positions of the groups where none does (they have index 0).
        inverse: (B * T,) int64, where each position stands in the groups.
    """

    shapes: list[tuple[int, int]]
    index: Tensor
    padding: Tensor
    inverse: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What pads a document follows it, where no position of it looks.
        sizes = [n * width for n, width in self.shapes]
        split = [_rearranged(x.flatten(0, 1), self, to_groups=True).split(sizes) for x in (q, k, v)]
        outs = [
            attend(*(part.unflatten(0, shape) for part in parts)).flatten(0, 1)
            for shape, *parts in zip(self.shapes, *split, strict=True)
        ]
        return _rearranged(torch.cat(outs), self, to_groups=False).view_as(q)


SHORT_ROW, FEW_DOCUMENTS = 256, 2
"""Rows up to this length and, on average, this number of documents are masked on a CPU: there the whole square costs no
more than laying out its documents. With seven it costs more than half as much again."""


def see_own_document(documents: Tensor) -> Tensor | DocumentRows | BlockMask:
    """What positions see in rows of documents (B, T) int64, in the form that is fastest on this device. A document is a
    run of one id; ids are distinct within a row."""
    if documents.device.type != "cpu":
        return document_block_mask(documents)
    B, T = documents.shape
    if T > SHORT_ROW or B + (documents[:, 1:] != documents[:, :-1]).sum() > FEW_DOCUMENTS * B:
        return document_rows(documents)
    steps = torch.arange(T)
    return ((documents[:, :, None] == documents[:, None, :]) & (steps[:, None] >= steps))[:, None]


def document_rows(documents: Tensor) -> DocumentRows:
    """The documents of rows (B, T) int64 as rows of their own; see `see_own_document`."""
    B, T = documents.shape
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([B * T]))
    sizes = lengths.float().log2().floor()
    shapes, indices, real = [], [], []
    for size in sizes.unique().tolist():
        of_size = sizes == size
        steps = torch.arange(int(lengths[of_size].max()), device=documents.device)
        there = steps < lengths[of_size][:, None]
        shapes.append(tuple(there.shape))
        indices.append(torch.where(there, starts[of_size][:, None] + steps, 0).flatten())
        real.append(there.flatten())
    index, here = torch.cat(indices), torch.cat(real)
    inverse = torch.empty_like(documents).flatten()
    inverse[index[here]] = here.nonzero()[:, 0]
    return DocumentRows(shapes, index, (~here).nonzero()[:, 0], inverse)


def document_block_mask(documents: Tensor) -> BlockMask:
    """Documents (B, T) int64 as the block mask of FlexAttention: causal, within a document."""

    def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    B, T = documents.shape
    return create_block_mask(same_document, B, None, T, T, device=str(documents.device))


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | Arrangement | BlockMask | None = None) -> Tensor:
    """Softmax attention with grouped queries, scaled by 1 / sqrt(Dh).

    Args:
        q: (B, T, H, Dh). k, v: (B, S, G, Dh), where G divides H.
        sees: None: position t sees 0..t. A mask (B or 1, 1, T, S) bool, True where the query sees the key. What
            `see_own_document` gave.

    Returns: (B, T, H, Dh).
    """
    if isinstance(sees, Arrangement):
        return _attend_elsewhere(q, k, v, sees)  # pyright: ignore[reportCallIssue]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if isinstance(sees, BlockMask):
        compiled = q.is_cuda and not torch.compiler.is_compiling()
        out = _flex_attention(compiled)(q, k, v, block_mask=sees, enable_gqa=group > 1)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)
    if sees is not None and q.is_cuda:
        # CUDA's memory-efficient kernel takes masks but no groups; for both together PyTorch falls back to
        # one that stores all T x S weights.
        k, v, group = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), 1
    out = dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None, enable_gqa=group > 1)
    return out.transpose(1, 2)


@torch.compiler.disable  # where to differs from batch to batch: it would be compiled for each anew
def _attend_elsewhere(q: Tensor, k: Tensor, v: Tensor, sees: Arrangement) -> Tensor:
    return sees.attend(q, k, v)


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's `scaled_dot_product_attention`; in float32 inside where a CPU without AMX would run its kernels for
    bfloat16, which take up to four times as long."""
    dtype = q.dtype
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if q.device.type != "cpu" or dtype != torch.bfloat16 or cpu_has("amx_bf16"):
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return out.to(dtype)


def _rearranged(x: Tensor, rows: DocumentRows, *, to_groups: bool) -> Tensor:
    return _Rearrange.apply(x, rows, to_groups)  # type: ignore[return-value]


class _Rearrange(torch.autograd.Function):
    """Positions (B * T, ...) to those of the groups, or back. Each is the other's gradient; the one that autograd
    would take adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: DocumentRows, to_groups: bool) -> Tensor:
        ctx.rows, ctx.to_groups = rows, to_groups
        return _rearrange(x, rows, to_groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _rearrange(gradients[0], ctx.rows, not ctx.to_groups), None, None


def _rearrange(x: Tensor, rows: DocumentRows, to_groups: bool) -> Tensor:
    if not to_groups:
        return x.index_select(0, rows.inverse)
    return x.index_select(0, rows.index).index_fill_(0, rows.padding, 0)


@cache
def _flex_attention(compiled: bool) -> Any:
    # Uncompiled it stores all T x S weights; on a CPU it is for tests, and has no backward.
    return torch.compile(flex_attention) if compiled else flex_attention
