"""The Conformer while an utterance is still being spoken: what it gives is what it would give for the whole utterance.

An encoder with `chunk_frames` looks no further than the end of a chunk. Here its keys and values, the last inputs of
its convolutions and the mel frames of an unfinished chunk are kept between calls.

Letters in shapes: N rows, R rows that run, F mel frames, C mel bins, T encoder frames, D model width, H heads, Dh width
of a head, L left frames, K the convolution's kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .conformer import Conformer, ConformerBlock, rotations, stack_frames
from .ragged import Frames


@dataclass
class BlockCache:
    """What one block keeps: keys and values (N, H, L, Dh), the newest at the end, and the last inputs of its
    convolution (N, K - 1, D)."""

    keys: Tensor
    values: Tensor
    gated: Tensor


class ConformerStream:
    """Encodes N utterances as they come. Rows are independent: each may get any number of frames in a call, also none,
    and begin a new utterance while others go on.

    Args:
        model: a `Conformer` whose config has `chunk_frames`; it is run in the mode in which it is, without gradients.
        rows: N.

    Raises:
        ValueError: the encoder has no chunks.
    """

    def __init__(self, model: Conformer, rows: int):
        config = model.config
        if config.chunk_frames is None or config.left_frames is None:
            raise ValueError("the encoder sees whole utterances; only one with chunk_frames in its config can stream")
        self.model, self.chunk, self.left = model, config.chunk_frames, config.left_frames
        weight = model.input.weight
        heads, width = config.n_heads, config.dim // config.n_heads
        self.caches = [
            BlockCache(
                keys=weight.new_zeros(rows, heads, self.left, width),
                values=weight.new_zeros(rows, heads, self.left, width),
                gated=weight.new_zeros(rows, config.conv_kernel - 1, config.dim),
            )
            for _ in range(config.n_layers)
        ]
        self.waiting = [weight.new_zeros(0, config.n_mels) for _ in range(rows)]
        self.done = torch.zeros(rows, dtype=torch.int64, device=weight.device)

    def reset(self, rows: list[int]) -> None:
        """These rows begin anew."""
        for n in rows:
            self.waiting[n] = self.waiting[n][:0]
        self.done[rows] = 0
        for cache in self.caches:
            # Keys and values need none: those beyond `done` are never attended to.
            cache.gated[rows] = 0

    @torch.no_grad()
    def push(self, features: Tensor, frames: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Takes what has come since the last call, and gives what can be encoded of it.

        Args:
            features: (N, F, C), padded on the right with anything.
            frames: (N,) int64, new mel frames of each row, from 0 on.
            ends: (N,) bool, True for the rows whose utterance ends with these frames; they begin anew afterwards.
                None: none does.

        Returns:
            The encoder frames that are new (N, T, D), zeros beyond each row's, and how many they are, (N,) int64. Those
            of all calls, one after another, are what `Conformer.forward` gives for the whole utterance.
        """
        for n, count in enumerate(frames.tolist()):
            self.waiting[n] = torch.cat((self.waiting[n], features[n, :count].to(self.waiting[n])))
        ending = set() if ends is None else set(ends.nonzero().flatten().tolist())
        full = self.chunk * self.model.config.stack
        given: list[list[Tensor]] = [[] for _ in self.waiting]
        while rows := [n for n, held in enumerate(self.waiting) if len(held) >= full or (n in ending and len(held))]:
            taken = [self.waiting[n][:full] for n in rows]
            encoded, lengths = self._chunk(rows, taken)
            for n, part, row, length in zip(rows, taken, encoded, lengths.tolist(), strict=True):
                self.waiting[n] = self.waiting[n][len(part) :]
                given[n].append(row[:length])
        if ending:
            self.reset(sorted(ending))
        nothing = self.model.input.weight.new_zeros(0, self.model.config.dim)
        joined = [torch.cat([nothing, *parts]) for parts in given]
        lengths = torch.tensor([len(row) for row in joined], device=self.done.device)
        return pad_sequence(joined, batch_first=True), lengths

    def _chunk(self, rows: list[int], features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One chunk of each of R rows, the last of an utterance perhaps a shorter one."""
        model, config = self.model, self.model.config
        index = torch.tensor(rows, device=self.done.device)
        frames = torch.tensor([len(part) for part in features], device=index.device)
        stacked, lengths = stack_frames(pad_sequence(features, batch_first=True), frames, config.stack)
        T, done = stacked.shape[1], self.done[index]
        positions = done[:, None] + torch.arange(T, device=index.device)
        rotation = rotations(positions, config.dim // config.n_heads, config.rope_theta)
        there = Frames(lengths, T)
        kept = torch.arange(self.left, device=index.device) >= self.left - done[:, None]
        sees = torch.cat((kept, there.valid), dim=1)[:, None, None, :]
        x = model.dropout(model.input(there.pack(stacked)))
        for block, cache in zip(model.blocks, self.caches, strict=True):
            assert isinstance(block, ConformerBlock)
            x = self._block(block, cache, index, x, there, rotation, sees)
        self.done[index] += lengths
        return there.pad(x), lengths

    def _block(
        self,
        block: ConformerBlock,
        cache: BlockCache,
        rows: Tensor,
        x: Tensor,
        frames: Frames,
        rotation: Tensor,
        sees: Tensor,
    ) -> Tensor:
        """`ConformerBlock.forward` with what was before the chunk; remembers what the next one needs."""
        x = torch.add(x, block.dropout(block.ffn_in(x)), alpha=0.5)
        attention, convolution = block.attention, block.convolution
        q, k, v = attention.split(frames.pad(attention.qkv(block.attention_norm(x))), rotation)
        keys = torch.cat((cache.keys[rows].to(k.dtype), k), dim=2)
        values = torch.cat((cache.values[rows].to(v.dtype), v), dim=2)
        x = x + block.dropout(attention.out(frames.pack(attention.weigh(q, keys, values, sees))))
        gated = torch.cat((cache.gated[rows], frames.pad(convolution.gate(x)).to(cache.gated.dtype)), dim=1)
        x = x + block.dropout(convolution.finish(frames.pack(convolution.depthwise_conv(gated, 0))))
        # Only the last chunk of an utterance is not full, and nothing comes after it.
        cache.keys[rows] = _last(keys, self.left).to(cache.keys.dtype)
        cache.values[rows] = _last(values, self.left).to(cache.values.dtype)
        cache.gated[rows] = gated[:, gated.shape[1] - cache.gated.shape[1] :]
        x = torch.add(x, block.dropout(block.ffn_out(x)), alpha=0.5)
        return block.norm(x)


def _last(x: Tensor, count: int) -> Tensor:
    """The last `count` entries of the third dimension, which has at least so many."""
    return x[:, :, x.shape[2] - count :]
