"""The next-token objective through the composed model."""

from __future__ import annotations

from torch import Tensor

from ..text.objective import Metrics, token_loss
from .batching import Batch
from .compose import ComposedModel


def next_token(model: ComposedModel, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
    """Cross-entropy of the assistant's tokens given text and inputs: (loss sum, number of targets, metrics)."""
    hidden = model.hidden(batch.tokens, batch.inputs, documents=batch.documents)
    return token_loss(model.text, hidden, batch.labels)
