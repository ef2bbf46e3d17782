"""Connectionist temporal classification (Graves et al., 2006) over encoder frames or soft tokens: small models
learn to hear with it; the paper trains through the language model alone.

Letters in shapes: N utterances, T frames, V classes, L target tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .conformer import valid_frames


def ctc_loss(
    logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets, summed over utterances, and the number of target tokens; arguments as in
    `ctc_by_utterance`."""
    return ctc_by_utterance(logits, lengths, targets, target_lengths, blank).sum(), target_lengths.sum()


def ctc_by_utterance(
    logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int = 0
) -> Tensor:
    """Negative log-likelihood of the targets of each utterance, (N,) float32 or float64.

    Args:
        logits: (N, T, V), any floating dtype; computed in float32 or wider.
        lengths: (N,) int64, frames of each utterance.
        targets: (N, L) int64 in 0..V-1 without the blank, padded on the right with anything.
        target_lengths: (N,) int64.
        blank: the class of the blank.

    Raises:
        ValueError: a target that is no class or the blank, or one that does not fit in its utterance's frames (every
            token takes one, and one more stands between equal neighbours).
    """
    real = valid_frames(target_lengths, targets.shape[1])
    if (real & ((targets < 0) | (targets >= logits.shape[-1]) | (targets == blank))).any():
        raise ValueError(f"CTC targets must be in 0..{logits.shape[-1] - 1} and not the blank, {blank}")
    repeats = ((targets[:, 1:] == targets[:, :-1]) & real[:, 1:]).sum(dim=1)
    for n in (target_lengths + repeats > lengths).nonzero().flatten().tolist():
        raise ValueError(
            f"utterance {n} of the batch: {int(target_lengths[n])} target tokens with {int(repeats[n])} "
            f"repeats do not fit in {int(lengths[n])} frames; drop it or use shorter targets"
        )
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.log_softmax(dim=-1).transpose(0, 1)
        return F.ctc_loss(scores, targets, lengths, target_lengths, blank=blank, reduction="none")


def least_frames(targets: Sequence[int]) -> int:
    """The frames that an utterance needs at least: one for every target, and one between equal neighbours."""
    return len(targets) + sum(a == b for a, b in pairwise(targets))


def greedy_ctc(logits: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """The best class of every frame, without repeats and blanks: the tokens of each utterance.

    Args:
        logits: (N, T, V).
        lengths: (N,) int64.
        blank: the class of the blank.
    """
    best = logits.argmax(dim=-1)
    kept = (best != blank) & valid_frames(lengths, best.shape[1])
    kept[:, 1:] &= best[:, 1:] != best[:, :-1]
    return [row[keep].tolist() for row, keep in zip(best.cpu(), kept.cpu(), strict=True)]
