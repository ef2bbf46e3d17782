"""Keys and values of earlier positions, for decoding. Letters as in `herdkit.text.model`; P prompts, N branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend

if TYPE_CHECKING:
    from .model import TransformerConfig

FIRST_CAPACITY = 256
"""Slots that a growing cache begins with."""


class Step(NamedTuple):
    """What all layers share of one pass with a cache.

    Args:
        slots: where the new keys go: one run of slots for all rows, or (B, T) int64.
        length: how many slots are read; 0 in the prefill of an empty cache, where the new keys are all there are.
        mask: additive, (B or 1, 1, H / G * T, length), or None where every slot that is read may be seen.
    """

    slots: slice | Tensor
    length: int
    mask: Tensor | None = None


class Cache(Protocol):
    """What `Transformer.hidden` asks of a cache."""

    def plan(self, positions: Tensor | None, width: int) -> Step:
        """Before the layers: makes room for `width` positions a row and says where they go. Without positions it is the
        prefill of an empty cache, positions 0..T-1.

        Raises:
            ValueError: a position is beyond the cache, or a prefill is not what this cache is for.
        """
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Stores k and v (B, T, G, Dh); the attention of q (B, T, H, Dh) to all that it may see, same shape."""
        ...


class KVCache:
    """One line of slots for each row. Slot = position, so rows of unequal length need no shifting: prompts are
    padded on the right, a query at position p sees slots 0..p of its row, and the slots that padding filled are
    overwritten before any query can see them.

    Args:
        config: the model's.
        batch: rows B.
        max_len: slots S of a row.
        dtype, device: of the stored tensors.
        growing: begin with few slots and double them as positions come, up to `max_len`.
        static: read all slots at every step, so that no shape changes and nothing waits for the device: what a
            compiled step needs. Positions are then not checked.

    Attributes:
        keys, values: for each layer (B, G, S, Dh).
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        growing: bool = False,
        static: bool = False,
    ):
        if growing and static:
            raise ValueError("a cache is either growing or static")
        self.max_len, self.static = max_len, static
        self.group = config.n_heads // config.n_kv_heads
        capacity = min(max_len, FIRST_CAPACITY) if growing else max_len
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        # Zeros, since slots that no query may see still take part, with weight 0: rubbish could be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    @property
    def capacity(self) -> int:
        """Slots that are allocated for each row."""
        return self.keys[0].shape[2]

    def plan(self, positions: Tensor | None, width: int) -> Step:
        if positions is None:
            self.reserve(width)
            return Step(slice(width), 0)
        if self.static:
            return Step(positions, self.max_len, self._mask(positions, self.max_len))
        first, last = (int(bound) for bound in positions.aminmax())
        self.reserve(last + 1)
        # Positions rise along a row, so this says that all rows have the same run of them.
        if last - first + 1 == width:
            mask = self._mask(positions[:1], last + 1) if width > 1 else None
            return Step(slice(first, last + 1), last + 1, mask)
        return Step(positions, last + 1, self._mask(positions, last + 1))

    def write(self, layer: int, slots: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Fills a run of slots of all rows, or the slots (B, T) int64, from (B, T, G, Dh)."""
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if isinstance(slots, slice):
                stored[:, :, slots] = new.transpose(1, 2)
            else:
                row = torch.arange(slots.shape[0], device=slots.device)[:, None]
                stored[row, :, slots] = new.to(stored.dtype)

    def read(self, layer: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots, (B, G, length, Dh) each."""
        return self.keys[layer][:, :, :length].to(dtype), self.values[layer][:, :, :length].to(dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        self.write(layer, step.slots, k, v)
        if not step.length:
            return attend(q, k, v)
        keys, values = self.read(layer, step.length, q.dtype)
        mask = None if step.mask is None else step.mask.to(q.dtype)
        out = F.scaled_dot_product_attention(fold(q, self.group), keys, values, attn_mask=mask)
        return unfold(out, q.shape[1])

    def rows(self, rows: slice | Tensor) -> KVCache:
        """Some of the rows: a slice shares the memory, an index (R,) int64 copies."""
        part = object.__new__(KVCache)
        part.max_len, part.static, part.group = self.max_len, self.static, self.group
        part.keys = [tensor[rows] for tensor in self.keys]
        part.values = [tensor[rows] for tensor in self.values]
        return part

    def _mask(self, positions: Tensor, length: int) -> Tensor:
        """(B, T) to (B, 1, H / G * T, length): 0 up to the position itself, then -inf."""
        hidden = torch.arange(length, device=positions.device) > positions[..., None]
        mask = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=positions.device)
        return mask.masked_fill_(hidden, -torch.inf).repeat(1, self.group, 1)[:, None]

    def reserve(self, length: int) -> None:
        """Makes room for positions 0..length-1; raises ValueError where that is beyond `max_len`."""
        if length > self.max_len:
            raise ValueError(f"position {length - 1} is beyond the cache's {self.max_len} slots")
        if length <= self.capacity:
            return
        more = min(max(length, 2 * self.capacity), self.max_len) - self.capacity
        # Layer by layer: the old and the new whole are never in memory together.
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = F.pad(tensor, (0, 0, 0, more))


class BranchedCache:
    """Several continuations of each prompt: the prompt's keys and values are there once, for all of them to read.

    Args:
        prompts: holds the P prompts, right-padded; it is not written to.
        lengths: tokens of each prompt.
        branches: N, continuations of each prompt. Row `p * N + n` continues prompt p; its positions go on from
            the prompt's length.
        own: an empty cache of P * N rows for the positions after the prompts.
    """

    def __init__(self, prompts: KVCache, lengths: list[int], branches: int, own: KVCache):
        self.prompts, self.branches, self.own = prompts, branches, own
        self.longest = max(lengths)
        device = own.keys[0].device
        self.starts = torch.tensor(lengths, device=device).repeat_interleave(branches)[:, None]
        self.mask: Tensor | None = None
        if min(lengths) < self.longest:
            padding = torch.arange(self.longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
            self.mask = torch.zeros(padding.shape, device=device).masked_fill_(padding, -torch.inf)[:, None, None]

    def plan(self, positions: Tensor | None, width: int) -> Step:
        if positions is None:
            raise ValueError("the prompts are in the cache already; give the positions of what follows")
        return self.own.plan(positions - self.starts, width)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        self.own.write(layer, step.slots, k, v)
        own_keys, own_values = self.own.read(layer, step.length, q.dtype)
        keys, values = self.prompts.read(layer, self.longest, q.dtype)
        q_own = fold(q, self.own.group) * q.shape[-1] ** -0.5
        P, _, G, _, Dh = q_all = (keys.shape[0], self.branches, *q_own.shape[1:])
        # (P, G, N * H / G * T, Dh): all branches of a prompt are queries of one product with its keys.
        together = q_own.view(q_all).transpose(1, 2).reshape(P, G, -1, Dh)
        to_prompt = together @ keys.transpose(-1, -2)
        if self.mask is not None:
            to_prompt = to_prompt + self.mask
        to_own = q_own @ own_keys.transpose(-1, -2)
        if step.mask is not None:
            to_own = to_own + step.mask
        to_own = to_own.view(*q_all[:4], -1).transpose(1, 2).reshape(P, G, together.shape[2], -1)
        weights = torch.cat([to_prompt, to_own], dim=-1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        for_prompt, for_own = weights.to(q.dtype).split([self.longest, step.length], dim=-1)
        out = (for_prompt @ values).view(P, G, self.branches, -1, Dh).transpose(1, 2).reshape(q_own.shape)
        for_own = for_own.reshape(P, G, self.branches, -1, step.length).transpose(1, 2).flatten(0, 1)
        return unfold(out + for_own @ own_values, q.shape[1])


def fold(q: Tensor, group: int) -> Tensor:
    """(B, T, H, Dh) to (B, G, H / G * T, Dh): the query heads of a key-value head become queries of one, so that no
    kernel has to copy keys for them."""
    B, T, H, Dh = q.shape
    return q.view(B, T, H // group, group, Dh).permute(0, 2, 3, 1, 4).reshape(B, H // group, group * T, Dh)


def unfold(out: Tensor, width: int) -> Tensor:
    """Back from (B, G, H / G * T, Dh) to (B, T, H, Dh)."""
    B, G, _, Dh = out.shape
    return out.view(B, G, -1, width, Dh).permute(0, 3, 1, 2, 4).reshape(B, width, -1, Dh)
