"""Decoding with a cache: batches of ragged prompts, greedy or sampled, whole or as a stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .model import KVCache, Transformer


class Forward(Protocol):
    """How the loop runs the model; a composed model brings its own, with its inputs at the first call."""

    def __call__(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, T, D) after the final norm.

        Args:
            tokens: (B, T) int64: at the first call the prompts, padded on the right; then (B, 1).
            positions: (B, T) int64: at the first call 0..T-1; then (B, 1).
            cache: the language model's, to be read and extended.
        """
        ...


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    forward: Forward | None = None,
) -> list[list[int]]:
    """Continues every prompt; a row does not depend on the others.

    Args:
        prompts: token ids, of any lengths.
        max_new_tokens: at most so many for each prompt.
        stop_ids: tokens that end a row; they are not part of the result, so a result of `max_new_tokens` was
            cut off.
        temperature: 0 takes the most probable token; otherwise the logits are divided by it.
        top_p: sample among the smallest set of tokens with at least this probability together.
        seed: row i draws from its own generator, seeded with `seed + i`; None draws a seed.
        forward: in place of `model.hidden`.

    Raises:
        ValueError: an argument out of range, an empty prompt, more tokens than the model's `max_seq_len`.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    rows: list[list[int]] = [[] for _ in prompts]
    if not rows:
        return rows
    for step in _decode(model, prompts, max_new_tokens, stop_ids, temperature, top_p, seed, forward):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    forward: Forward | None = None,
) -> Iterator[int]:
    """`generate` for one prompt, token by token (`StreamDecoder` turns them into text). Errors arise at the
    call, not at the first token."""
    _check(model, [prompt], max_new_tokens, temperature, top_p)
    steps = _decode(model, [prompt], max_new_tokens, stop_ids, temperature, top_p, seed, forward)
    return (token for (token,) in steps if token is not None)


def sample(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token for each row by inversion of the cumulative distribution.

    Args:
        logits: (B, V).
        uniform: (B,) float32 in [0, 1), the draws.
        temperature: above 0. top_p: in (0, 1].

    Returns: (B,) int64.
    """
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = before < top_p
    cumulative = torch.where(kept, probabilities, 0).cumsum(-1)
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    choice = torch.minimum(choice, kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, choice)[:, 0]


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, but is {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if not all(prompts):
        raise ValueError("a prompt is empty; begin with <|begin_of_text|>")
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed max_seq_len "
            f"({model.config.max_seq_len})"
        )


def _plain(model: Transformer, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    # Prompts stand at 0..T-1, the model's default, for which it takes the plain causal kernel.
    prefill = tokens.shape[1] > 1
    return model.hidden(tokens, positions=None if prefill else positions, cache=cache)


@torch.inference_mode()
def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float,
    seed: int | None,
    forward: Forward | None,
) -> Iterator[list[int | None]]:
    """Yields for each step the new token of every row, None for rows that have ended."""
    weight = model.tok_embeddings.weight
    device, dtype = weight.device, weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    seed = torch.Generator().seed() % 2**62 if seed is None else seed
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    stops = set(stop_ids)
    forward = forward or partial(_plain, model)

    longest = max(map(len, prompts))
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, dtype, device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    columns = torch.arange(longest, device=device).expand(len(prompts), -1)
    hidden = forward(torch.tensor(padded, device=device), columns, cache)
    # Only the last token of each prompt is projected: the logits of a whole prompt can outweigh the model.
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    positions = lengths
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        logits = model.unembed(hidden)
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            tokens = sample(logits, draws.to(device), temperature=temperature, top_p=top_p)
        new = tokens.tolist()
        running = [alive and token not in stops for alive, token in zip(running, new, strict=True)]
        yield [token if alive else None for alive, token in zip(running, new, strict=True)]
        if not any(running) or step == max_new_tokens - 1:
            return
        hidden = forward(tokens[:, None], positions[:, None], cache)[:, 0]
        positions = positions + 1
