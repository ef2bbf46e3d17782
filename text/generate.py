"""Decoding with a cache: batches of ragged prompts, several samples of each, whole or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .cache import BranchedCache, Cache, KVCache
from .completion import Completion, Row, text_pieces
from .model import Transformer
from .sampling import SamplingOptions, log_probs, sample
from .speculative import Speculation, speculative_steps
from .tokenizer import Tokenizer

PREFILL_TOKENS = 2048
"""Prompts run through the model together up to so many tokens, padding included: more would only take memory."""
STATIC_SLOTS = 256
"""A static cache has a multiple of so many slots, so that requests of similar lengths share a compiled step."""


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
    options: SamplingOptions | None = None,
    *,
    samples: int = 1,
    seed: int | Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    forward: Forward | None = None,
    step: Forward | None = None,
    slots: int | None = None,
    speculation: Speculation | None = None,
    kept: KeptPrompt | None = None,
) -> list[Completion]:
    """Continues every prompt; a row does not depend on the others.

    Args:
        prompts: token ids, of any lengths.
        options: default `SamplingOptions()`: greedy, 256 tokens, no stops.
        samples: N, continuations of each prompt. The prompt is run once, and all of them read its keys and values in
            one place; with `step` or `speculation` each gets a copy.
        seed: of each prompt, or one number: prompt i then has `seed + i`; None draws one. The draws of sample n follow
            from its prompt's seed and n alone.
        tokenizer: needed for `options.stop_strings`.
        forward: in place of `model.hidden`, with one sample a prompt.
        step: in place of `model.hidden` after the prompts, with a static cache (`herdkit.text.compiled`).
        slots: of that cache, for the longest prompt and what is generated. Requests of one number of rows and slots
            share a compiled step. Default: the next multiple of STATIC_SLOTS.
        speculation: a draft model that proposes tokens.
        kept: what an earlier request left, for one prompt, one sample and none of `forward`, `step` and `speculation`.

    Returns: P * N completions; sample n of prompt p is number p * N + n.

    Raises:
        ValueError: an argument out of range, an empty prompt, more tokens than the model's `max_seq_len`, arguments
            that exclude each other.
    """
    request = _Request(model, prompts, options, samples, seed, tokenizer, forward, step, slots, speculation, kept)
    for _ in request.steps():
        pass
    return [row.completion for row in request.rows]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    options: SamplingOptions | None = None,
    *,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    forward: Forward | None = None,
    step: Forward | None = None,
    speculation: Speculation | None = None,
    kept: KeptPrompt | None = None,
) -> Iterator[int]:
    """`generate` for one prompt, token by token. Errors arise at the call, not at the first token."""
    request = _Request(model, [prompt], options, 1, seed, tokenizer, forward, step, None, speculation, kept)

    def tokens() -> Iterator[int]:
        given, new = 0, request.rows[0].completion.tokens
        for _ in request.steps():
            yield from new[given:]
            given = len(new)

    return tokens()


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    options: SamplingOptions | None = None,
    **arguments,
) -> Iterator[str]:
    """`stream` in pieces of text: whole characters, nothing of a stop string. Arguments as in `stream`."""
    tokens = stream(model, prompt, options, tokenizer=tokenizer, **arguments)
    return text_pieces(tokenizer, tokens, options.stop_strings if options else ())


class _Request:
    """The arguments of `generate`, checked, and the rows that they become."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions | None,
        samples: int,
        seed: int | Sequence[int] | None,
        tokenizer: Tokenizer | None,
        forward: Forward | None,
        step: Forward | None,
        slots: int | None,
        speculation: Speculation | None,
        kept: KeptPrompt | None,
    ):
        self.model, self.prompts, self.samples, self.kept = model, prompts, samples, kept
        self.options = options = options or SamplingOptions()
        self.forward, self.step, self.slots, self.speculation = forward, step, slots, speculation
        self._check(tokenizer)
        self.rows = [Row(options, s, n, tokenizer) for s in self._seeds(seed) for n in range(samples)]

    def _check(self, tokenizer: Tokenizer | None) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")
        if not all(self.prompts):
            raise ValueError("a prompt is empty; begin with <|begin_of_text|>")
        if self.options.stop_strings and tokenizer is None:
            raise ValueError("stop_strings need the tokenizer")
        if sum(way is not None for way in (self.forward, self.step, self.speculation)) > 1:
            raise ValueError("give only one of forward, step and speculation")
        if self.forward is not None and self.samples > 1:
            raise ValueError("an own forward takes one sample a prompt; repeat the prompts and their inputs instead")
        if self.kept is not None:
            others = (self.forward, self.step, self.speculation)
            if any(way is not None for way in others) or len(self.prompts) != 1 or self.samples != 1:
                raise ValueError("kept goes with one prompt, one sample, and no forward, step or speculation")
        if self.slots is not None and self.step is None:
            raise ValueError("slots are those of the static cache, which only a step uses")
        if self.speculation is not None:
            self.speculation.check(self.model)
        models = [self.model] if self.speculation is None else [self.model, self.speculation.draft]
        longest, new = max(map(len, self.prompts), default=0), self.options.max_new_tokens
        for model in models if longest else ():
            if longest + new > model.config.max_seq_len:
                raise ValueError(
                    f"a prompt of {longest} tokens and {new} new ones exceed max_seq_len ({model.config.max_seq_len})"
                )
        if self.slots is not None and longest + new > self.slots:
            raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the {self.slots} slots")

    def _seeds(self, seed: int | Sequence[int] | None) -> Sequence[int]:
        if seed is None:
            seed = int(np.random.default_rng().integers(2**62))
        seeds = range(seed, seed + len(self.prompts)) if isinstance(seed, int) else seed
        if len(seeds) != len(self.prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(self.prompts)} prompts")
        if any(s < 0 for s in seeds):
            raise ValueError(f"a seed must not be negative, but one is {min(seeds)}")
        return seeds

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Runs the rows to their ends; from one step to the next each that runs gets at least one token."""
        if not self.rows:
            return
        # Neighbours of like length make the least padding. An own forward knows its rows by their place.
        order = list(range(len(self.prompts)))
        if self.forward is None:
            order.sort(key=lambda i: -len(self.prompts[i]))
        prompts, N = [self.prompts[i] for i in order], self.samples
        rows = [self.rows[i * N + n] for i in order for n in range(N)]
        cache, hidden = self._prefill(self.model, prompts)
        of_row = torch.arange(len(prompts), device=hidden.device).repeat_interleave(N)
        tokens = _next(self.model.unembed(hidden[of_row]), rows, self.options)
        positions = torch.tensor([len(prompt) for prompt in prompts], device=hidden.device)[of_row]
        self._keep()
        yield
        if self.speculation is not None:
            draft_cache, _ = self._prefill(self.speculation.draft, prompts)
            caches = (cache, draft_cache) if N == 1 else (cache.rows(of_row), draft_cache.rows(of_row))
            last = torch.tensor([prompt[-1] for prompt in prompts], device=hidden.device)[of_row]
            pairs = torch.stack([last, tokens], dim=1)
            yield from speculative_steps(self.model, self.speculation, rows, pairs, positions, caches, self.options)
        elif self._branched:
            own = _cache(self.model, len(rows), self.options.max_new_tokens, growing=True)
            branches = BranchedCache(cache, [len(prompt) for prompt in prompts], N, own)
            yield from self._decode(self._plain, rows, tokens, positions, branches)
        else:
            cache = cache if N == 1 else cache.rows(of_row)
            yield from self._decode(self.step or self.forward or self._plain, rows, tokens, positions, cache)

    def _keep(self) -> None:
        """What the cache holds after a step: all but the newest token, which has not been run."""
        if self.kept is not None:
            self.kept.tokens = [*self.prompts[0], *self.rows[0].completion.tokens[:-1]]

    def _decode(
        self, forward: Callable[..., Tensor], rows: Sequence[Row], tokens: Tensor, positions: Tensor, cache: Cache
    ) -> Iterator[None]:
        """One token a row and step. tokens, positions: (B,), the newest of each row."""
        while alive := [i for i, row in enumerate(rows) if row.running]:
            if forward == self._plain and isinstance(cache, KVCache) and len(alive) <= len(rows) // 2:
                kept = torch.tensor(alive, device=tokens.device)
                rows, tokens, positions, cache = (
                    [rows[i] for i in alive],
                    tokens[kept],
                    positions[kept],
                    cache.rows(kept),
                )
            hidden = forward(tokens[:, None], positions[:, None], cache)[:, 0]
            tokens = _next(self.model.unembed(hidden), rows, self.options)
            positions = positions + 1
            self._keep()
            yield

    def _plain(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        return self.model.hidden(tokens, positions=positions, cache=cache)

    @property
    def _branched(self) -> bool:
        return self.samples > 1 and self.step is None and self.speculation is None

    def _prefill(self, model: Transformer, prompts: Sequence[Sequence[int]]) -> tuple[KVCache, Tensor]:
        """A cache with the prompts and room for what follows, and the hidden states (P, D) at their ends."""
        if self.kept is not None:
            return self.kept.prefill(model, prompts[0], len(prompts[0]) + self.options.max_new_tokens)
        lengths, longest, slots = [len(p) for p in prompts], max(map(len, prompts)), 0
        if not self._branched:
            slots = self.options.max_new_tokens + (self.speculation.length if self.speculation else 0)
        if self.step is not None:
            slots = (self.slots or static_slots(longest + slots)) - longest
        cache = _cache(model, len(prompts), longest + slots, growing=self.step is None, static=self.step is not None)
        cache.reserve(longest)
        if self.forward is not None:
            tokens = _padded(prompts, model)
            columns = torch.arange(longest, device=tokens.device).expand_as(tokens)
            return cache, _last(self.forward(tokens, columns, cache), lengths)
        found, start = [], 0
        while start < len(prompts):
            chunk = slice(start, start + max(1, PREFILL_TOKENS // lengths[start]))
            # Only the last token of each prompt is projected: the logits of a whole prompt can outweigh the model.
            found.append(_last(model.hidden(_padded(prompts[chunk], model), cache=cache.rows(chunk)), lengths[chunk]))
            start = chunk.stop
        return cache, torch.cat(found)


class KeptPrompt:
    """The keys and values of what a request read and wrote, so that the next one runs only what differs: the turns of a
    chat. To be given to one request after another; what a request leaves takes the place of what was there.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        """Those whose keys and values are there."""
        self._cache: KVCache | None = None
        self._kind: tuple[Transformer, torch.dtype, torch.device] | None = None

    def prefill(self, model: Transformer, prompt: Sequence[int], slots: int) -> tuple[KVCache, Tensor]:
        """Runs what of the prompt is not there; the cache and the hidden state (1, D) at the prompt's end."""
        fresh = _cache(model, 1, slots, growing=True)
        like, cache = fresh.keys[0], self._cache
        kind = (model, like.dtype, like.device)
        if cache is None or self._kind != kind:
            cache, self.tokens = fresh, []
            self._cache, self._kind = cache, kind
        shared = 0
        while shared < min(len(self.tokens), len(prompt) - 1) and self.tokens[shared] == prompt[shared]:
            shared += 1
        del self.tokens[shared:]  # should the model fail now, the rest is not to be trusted
        cache.max_len = slots
        tokens = torch.tensor([prompt[shared:]], device=like.device)
        positions = torch.arange(shared, len(prompt), device=like.device)[None] if shared else None
        return cache, model.hidden(tokens, positions=positions, cache=cache)[:, -1]


def static_slots(needed: int) -> int:
    """The next multiple of STATIC_SLOTS."""
    return -(-needed // STATIC_SLOTS) * STATIC_SLOTS


def _cache(model: Transformer, rows: int, slots: int, **kind: bool) -> KVCache:
    weight = model.tok_embeddings.weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    return KVCache(model.config, rows, slots, dtype, weight.device, **kind)


def _padded(prompts: Sequence[Sequence[int]], model: Transformer) -> Tensor:
    longest = max(map(len, prompts))
    rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    return torch.tensor(rows, device=model.tok_embeddings.weight.device)


def _last(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, T, D) to (B, D), at the last token of each row."""
    return hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]


def _next(logits: Tensor, rows: Sequence[Row], options: SamplingOptions) -> Tensor:
    """Draws a token (B,) for every row from logits (B, V) and gives it to those that run."""
    uniform = torch.zeros(len(rows))
    if not options.greedy:
        uniform = torch.tensor([row.draws.random(dtype=np.float32) for row in rows])
    tokens = sample(logits, uniform.to(logits.device), options)
    for row, token, log_prob in zip(rows, tokens.tolist(), log_probs(logits, tokens).tolist(), strict=True):
        if row.running:
            row.take(token, log_prob)
    return tokens
