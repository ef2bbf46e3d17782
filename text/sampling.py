"""How a token is drawn from logits. B rows, V vocabulary, K candidates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FIRST_CANDIDATES = 256
"""Where nothing but a share of the probability bounds the candidates, so many are tried before all are sorted."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a prompt is continued.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 takes the most probable token; otherwise the logits are divided by it. The filters follow, in
            this order:
        top_k: keep the k most probable tokens; None keeps all.
        top_p: of those, keep the smallest set with at least this share of their probability.
        min_p: keep tokens with at least this part of the probability of the most probable one.
        stop_ids: tokens that end the text; they are not part of the result.
        stop_strings: texts that end the text; they are cut off (see `Completion`).

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings must be a list of texts that are not empty, not {self.stop_strings!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def row_generator(seed: int, sample: int = 0) -> np.random.Generator:
    """The source of a row's draws: a function of the request's seed and the number of the sample, and of nothing else,
    so that a row does not depend on its neighbours, on the device or on the size of the batch."""
    return np.random.default_rng((seed, sample))


def sample(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """One token for each row, by inversion of the cumulative distribution of what `candidates` keeps.

    Args:
        logits: (B, V).
        uniform: (B,) float32 in [0, 1), the draws; unused where the options are greedy.

    Returns: (B,) int64.
    """
    if options.greedy:
        return logits.argmax(-1)
    weights, order = candidates(logits, options)
    choice = invert(weights, uniform)
    return choice if order is None else order.gather(-1, choice[:, None])[:, 0]


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(..., V) and (...) to the natural logarithms of the tokens' probabilities (...), float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)


def distribution(logits: Tensor, options: SamplingOptions) -> Tensor:
    """The probabilities (..., V) with which `sample` draws each token."""
    if options.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    weights, order = candidates(logits.flatten(0, -2), options)
    weights = weights / weights.sum(-1, keepdim=True)
    if order is not None:
        # Added, not set: the filling of short rows names token 0, with weight 0.
        weights = weights.new_zeros(len(weights), logits.shape[-1]).scatter_add_(-1, order, weights)
    return weights.view(logits.shape)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B, K) weights of any sum and (B,) draws in [0, 1) to (B,) int64, none of them of weight 0."""
    cumulative = weights.cumsum(-1)
    choice = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    # A draw next to 1 can be rounded up to the whole sum, which is past the last candidate.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(choice, last)


def candidates(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor | None]:
    """The tokens that the options keep, as (weights, order).

    Args:
        logits: (B, V).

    Returns: weights (B, K) float32 or wider, probabilities that were not normalised again, 0 for tokens that are not
        kept; order (B, K) int64, their tokens, falling in probability, or None where column = token.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / options.temperature
    vocabulary = logits.shape[-1]
    if options.top_k is None and options.top_p == 1:
        weights = logits.softmax(-1)
        if options.min_p:
            weights = weights.masked_fill(weights < options.min_p * weights.amax(-1, keepdim=True), 0)
        return weights, None
    if options.top_k is not None:
        top, order = logits.topk(min(options.top_k, vocabulary), dim=-1)
        return _filtered(top.softmax(-1), options), order
    # Sorting a large vocabulary takes longer than a layer of a small model, and nearly always a few tokens hold the
    # share asked for. Each row decides for itself, so that it does not depend on its neighbours.
    total = logits.logsumexp(-1, keepdim=True)
    top, order = logits.topk(min(FIRST_CANDIDATES, vocabulary), dim=-1)
    weights = (top - total).exp()
    short = (weights.sum(-1) < options.top_p).nonzero()[:, 0] if top.shape[-1] < vocabulary else ()
    weights = _filtered(weights, options)
    if not len(short):
        return weights, order
    probabilities, sorted_order = logits[short].softmax(-1).sort(dim=-1, descending=True, stable=True)
    filling = (0, vocabulary - weights.shape[-1])
    weights, order = F.pad(weights, filling), F.pad(order, filling)
    weights[short], order[short] = _filtered(probabilities, options), sorted_order
    return weights, order


def _filtered(probabilities: Tensor, options: SamplingOptions) -> Tensor:
    """Top-p and min-p on probabilities (B, K) that fall along the row; what goes becomes 0."""
    gone = probabilities < options.min_p * probabilities[:, :1]
    if options.top_p < 1:
        gone |= probabilities.cumsum(-1) - probabilities >= options.top_p
    # The first stays whatever the rounding.
    gone[:, 0] = False
    return probabilities.masked_fill(gone, 0)
