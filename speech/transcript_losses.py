"""What an adapter learns from transcripts without the language model: CTC losses of its encoder's frames and of its
soft tokens. Neither is in the paper; both shorten the way by far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.contract import InputLoss
from .ctc import ctc_by_utterance

if TYPE_CHECKING:
    from .adapter import SpeechAdapter

BYTES, TOKENS = "bytes_said", "tokens_said"
"""Among the tensors of N recordings, what is said in them: (N, L) int64, padded on the right; its lengths, (N,) int64,
are under the same name with "_lengths". Bytes are of UTF-8, tokens of the language model."""


def said(name: str, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Tensors of N recordings with what is said, `BYTES` or `TOKENS`."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    return {name: ids, f"{name}_lengths": torch.tensor([len(row) for row in rows])}


@dataclass(kw_only=True)
class TranscriptLosses:
    """The losses of recordings among whose tensors is what is said; a weight is that of an `InputLoss`.

    Args:
        ctc_weight: of the loss that spells bytes off the encoder's frames; needs the adapter's CTC head.
        alignment_weight: of the loss that reads the language model's tokens off the soft tokens.
        blank: the token that stands where no word is heard, for the alignment.
    """

    ctc_weight: float = 1.0
    alignment_weight: float = 1.0
    blank: int = -1

    def of_frames(
        self, adapter: SpeechAdapter, encoded: Tensor, lengths: Tensor, batch: Mapping[str, Tensor]
    ) -> dict[str, InputLoss]:
        """Of what `adapter.encode` gave for a batch."""
        if BYTES not in batch or not self.ctc_weight:
            return {}
        # Class 0 is the blank, so that the byte b is class b + 1.
        targets, sizes = batch[BYTES] + 1, batch[f"{BYTES}_lengths"]
        values = ctc_by_utterance(adapter.ctc_logits(encoded), lengths, targets, sizes)
        return {"ctc_loss": InputLoss(values, sizes, self.ctc_weight)}

    def of_soft_tokens(self, logits: Tensor, lengths: Tensor, batch: Mapping[str, Tensor]) -> dict[str, InputLoss]:
        """Of what `adapter.token_logits` gave for the soft tokens of `adapter.bridge`, whose lengths they are."""
        if TOKENS not in batch or not self.alignment_weight:
            return {}
        targets, sizes = batch[TOKENS], batch[f"{TOKENS}_lengths"]
        # Without the two vectors around the utterance.
        values = ctc_by_utterance(logits[:, 1:], lengths - 2, targets, sizes, self.blank)
        return {"alignment_loss": InputLoss(values, sizes, self.alignment_weight)}
