"""Speculative decoding: a small draft model proposes a few tokens, one pass of the target model judges them all
(Leviathan et al., arXiv 2211.17192). The tokens are distributed as those of the target alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import KVCache
from .completion import Row
from .model import Transformer
from .sampling import SamplingOptions, distribution, invert, log_probs


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """
    Args:
        draft: a smaller model of the same vocabulary.
        length: tokens that it proposes at a time.

    Raises:
        ValueError: the length is below 1.
    """

    draft: Transformer
    length: int = 4

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"a speculation's length must be at least 1, not {self.length}")

    def check(self, model: Transformer) -> None:
        """
        Raises:
            ValueError: the draft has another vocabulary than the model.
        """
        ours, theirs = model.config.vocab_size, self.draft.config.vocab_size
        if ours != theirs:
            raise ValueError(f"the draft model has a vocabulary of {theirs} tokens, the model one of {ours}")


def speculative_steps(
    model: Transformer,
    speculation: Speculation,
    rows: Sequence[Row],
    tokens: Tensor,
    positions: Tensor,
    caches: tuple[KVCache, KVCache],
    options: SamplingOptions,
) -> Iterator[None]:
    """Runs the rows to their ends; from one step to the next each gets one to `length + 1` tokens.

    Args:
        tokens: (B, 2), the last token of each prompt and the first new one, which the rows have already.
        positions: (B,), of the first new token.
        caches: the model's and the draft's, filled with the prompts.
    """
    cache, draft_cache = caches
    columns = torch.arange(speculation.length + 1, device=tokens.device)
    while True:
        alive = [i for i, row in enumerate(rows) if row.running]
        if not alive:
            return
        if len(alive) <= len(rows) // 2:
            kept = torch.tensor(alive, device=tokens.device)
            rows, tokens, positions = [rows[i] for i in alive], tokens[kept], positions[kept]
            cache, draft_cache = cache.rows(kept), draft_cache.rows(kept)
        draws = torch.from_numpy(np.stack([row.draws.random(2 * speculation.length + 1, "f4") for row in rows]))
        draws = draws.to(tokens.device)
        proposed, drafts = _propose(speculation, tokens, positions, draft_cache, options, draws)
        window = torch.cat([tokens[:, 1:], proposed], dim=1)
        logits = model.unembed(model.hidden(window, positions=positions[:, None] + columns, cache=cache))
        accepted, following = _judge(logits, proposed, drafts, options, draws[:, speculation.length :])
        new = torch.cat([proposed, following], dim=1).scatter_(1, accepted, following)
        for row, row_tokens, row_log_probs, count in zip(
            rows, new.tolist(), log_probs(logits, new).tolist(), accepted[:, 0].tolist(), strict=True
        ):
            for token, log_prob in zip(row_tokens[: count + 1], row_log_probs, strict=False):
                if row.running:
                    row.take(token, log_prob)
        yield
        # A row at its end stays where it is: its cache has no room for more.
        running = torch.tensor([row.running for row in rows], device=tokens.device)
        positions = torch.where(running, positions + accepted[:, 0] + 1, positions)
        tokens = torch.cat([window.gather(1, accepted), following], dim=1)


def _propose(
    speculation: Speculation,
    tokens: Tensor,
    positions: Tensor,
    cache: KVCache,
    options: SamplingOptions,
    draws: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Proposed tokens (B, K), and the distributions (B, K, V) that they were drawn from, None where greedy."""
    draft, proposed, drafts = speculation.draft, [], []
    # The newest token and the one before, which the draft has not seen where it was the last of those proposed.
    columns = positions[:, None] + torch.tensor([-1, 0], device=positions.device)
    for i in range(speculation.length):
        logits = draft.unembed(draft.hidden(tokens, positions=columns, cache=cache)[:, -1])
        if options.greedy:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            drafts.append(distribution(logits, options))
            tokens = invert(drafts[-1], draws[:, i])[:, None]
        proposed.append(tokens)
        columns = columns[:, -1:] + 1
    return torch.cat(proposed, dim=1), torch.stack(drafts, dim=1) if drafts else None


def _judge(
    logits: Tensor, proposed: Tensor, drafts: Tensor | None, options: SamplingOptions, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """How many of the proposed tokens stand, and the token that follows them, both (B, 1).

    Args:
        logits: (B, K + 1, V), the target's. proposed, drafts: of `_propose`. draws: (B, K + 1).
    """
    if drafts is None:
        best = logits.argmax(-1)
        accepted = (proposed == best[:, :-1]).long().cumprod(-1).sum(-1, keepdim=True)
        return accepted, best.gather(1, accepted)
    targets = distribution(logits, options)
    # Token t stands with probability min(1, target(t) / draft(t)) ...
    target, draft = (p.gather(-1, proposed[..., None])[..., 0] for p in (targets[:, :-1], drafts))
    accepted = (draws[:, :-1] * draft < target).long().cumprod(-1).sum(-1, keepdim=True)
    # ... and at the first that falls, one is drawn from what the target has more of than the draft.
    at = accepted[..., None].expand(-1, -1, targets.shape[-1])
    target, draft = targets.gather(1, at)[:, 0], F.pad(drafts, (0, 0, 0, 1)).gather(1, at)[:, 0]
    rest = (target - draft).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)  # equal but for rounding
    return accepted, invert(rest, draws[:, -1])[:, None]
