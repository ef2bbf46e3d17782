"""What a composed model learns from dialogs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..text.objective import token_loss
from ..text.rows import IGNORE
from ..train.layout import LayoutError
from ..train.objective import Outcome
from ..train.place import Place
from .batching import Batch
from .compose import ComposedModel


@dataclass(kw_only=True)
class DialogObjective:
    """Cross-entropy of the assistant's tokens given text and inputs, and the losses that adapters find by themselves;
    the count is that of the assistant's tokens.

    Args:
        answer_weight: of the cross-entropy. At 0 the language model is left out; where its weights are in shards, an
            adapter that reads the embeddings then needs inputs in every batch, as all processes gather them together.
    """

    answer_weight: float = 1.0

    @property
    def reads_text(self) -> bool:
        """Whether the language model runs."""
        return self.answer_weight > 0

    def require_fits(self, place: Place) -> None:
        """
        Raises:
            LayoutError: the layout shares what this cannot do without, or has nothing to do.
        """
        if place.layout.pipeline > 1 and not self.reads_text:
            raise LayoutError(
                "pipeline", "nothing to share: answer_weight 0 leaves out the layers of the language model"
            )

    def __call__(self, model: ComposedModel, batch: Batch) -> Outcome:
        if self.reads_text:
            hidden, found = model.hidden_and_loss(batch.tokens, batch.inputs, documents=batch.documents)
            loss, count, metrics = self.of_answers(model, hidden, batch)
        else:
            found = model.adapter_loss(model.own_contribution(name, given) for name, given in batch.inputs.items())
            loss = torch.zeros((), device=batch.labels.device)
            count, metrics = (batch.labels != IGNORE).sum(), {}
        if found is None:
            return loss, count, metrics
        return loss + found[0], count, {**metrics, **found[2]}

    def of_answers(self, model: ComposedModel, hidden: Tensor, batch: Batch) -> Outcome:
        """What `model`, or the last stage of it, finds with the hidden states (B, T, D) of a batch."""
        loss, count, metrics = token_loss(model.text, hidden, batch.labels)
        return self.answer_weight * loss, count, metrics


next_token = DialogObjective()
"""Of dialogs whose adapters have no losses, next-token prediction alone."""
