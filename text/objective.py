"""The next-token objective of every text stage and of every stage that trains through the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import linear_cross_entropy
from .model import Transformer
from .rows import IGNORE, TokenBatch

Metrics = dict[str, tuple[Tensor, Tensor]]


def next_token(model: Transformer, batch: TokenBatch) -> tuple[Tensor, Tensor, Metrics]:
    """Cross-entropy of the labelled positions: (loss sum, number of targets, metrics)."""
    hidden = model.hidden(batch.tokens, documents=batch.documents)
    return token_loss(model, hidden, batch.labels)


def token_loss(model: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """Summed cross-entropy of hidden states (B, T, D) against labels (B, T), `IGNORE` where there is none.

    Only labelled positions are projected to the vocabulary: in a dialog most are not.
    """
    counted = labels != IGNORE
    count = counted.sum()
    loss, right = linear_cross_entropy(hidden[counted], model.output_weight, labels[counted])
    return loss, count, {"accuracy": (right, count)}


def row_loss(model: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """`token_loss` of packed rows, which also tells how much of them is used: the share of positions with a target."""
    loss, count, metrics = token_loss(model, hidden, labels)
    return loss, count, {**metrics, "row_fill": (count, torch.tensor(labels.numel()))}
