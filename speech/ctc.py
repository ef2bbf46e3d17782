"""Connectionist temporal classification over encoder frames (Graves et al., 2006): a head that tests and
small models train the encoder with; the paper trains it through the language model alone. Class 0 is the
blank.

Letters in shapes: N utterances, T encoder frames, V classes, L target tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .conformer import valid_frames

BLANK = 0


def ctc_loss(logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets, summed over utterances, and the number of target tokens.

    Args:
        logits: (N, T, V), any floating dtype; computed in float32 or wider.
        lengths: (N,) int64, frames of each utterance.
        targets: (N, L) int64 in 1..V-1, padded on the right with anything.
        target_lengths: (N,) int64.

    Raises:
        ValueError: a target outside 1..V-1, or one that cannot be written in its utterance's frames (every
            token takes one, and one more stands between equal neighbours).
    """
    real = valid_frames(target_lengths, targets.shape[1])
    if (real & ((targets <= BLANK) | (targets >= logits.shape[-1]))).any():
        raise ValueError(f"CTC targets must be in 1..{logits.shape[-1] - 1}")
    repeats = ((targets[:, 1:] == targets[:, :-1]) & real[:, 1:]).sum(dim=1)
    for n in (target_lengths + repeats > lengths).nonzero().flatten().tolist():
        raise ValueError(
            f"utterance {n} of the batch: {int(target_lengths[n])} target tokens with {int(repeats[n])} "
            f"repeats do not fit in {int(lengths[n])} frames; drop it or use shorter targets"
        )
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.log_softmax(dim=-1).transpose(0, 1)
        loss_sum = F.ctc_loss(scores, targets, lengths, target_lengths, blank=BLANK, reduction="sum")
    return loss_sum, target_lengths.sum()


def greedy_ctc(logits: Tensor, lengths: Tensor) -> list[list[int]]:
    """The best class of every frame, without repeats and blanks: the tokens of each utterance.

    Args:
        logits: (N, T, V).
        lengths: (N,) int64.
    """
    best = logits.argmax(dim=-1)
    kept = (best != BLANK) & valid_frames(lengths, best.shape[1])
    kept[:, 1:] &= best[:, 1:] != best[:, :-1]
    return [row[keep].tolist() for row, keep in zip(best.cpu(), kept.cpu(), strict=True)]
