"""Token documents laid out as the rows of a training batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.packing import pack

IGNORE = -100
"""The label of a position that is no target, as in `torch.nn.functional.cross_entropy`."""

PADDING = -1
"""The document of what `even_rows` adds."""


@dataclass
class Document:
    """One document or dialog in tokens.

    Args:
        tokens: token ids.
        targets: for each token, whether predicting it counts in the loss.
    """

    tokens: list[int]
    targets: list[bool]


@dataclass
class TokenBatch:
    """Rows of tokens.

    Args:
        tokens: (B, T) int64, padded on the right.
        labels: (B, T) int64, the token that each position should predict, or `IGNORE`.
        documents: (B, T) int64, which document of its row a position belongs to; None where every row is one
            document, for which a causal mask is enough.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None

    def to(self, device) -> TokenBatch:
        documents = None if self.documents is None else self.documents.to(device)
        return TokenBatch(self.tokens.to(device), self.labels.to(device), documents)

    def slice(self, start: int, stop: int) -> TokenBatch:
        """Rows start to stop - 1."""
        documents = None if self.documents is None else self.documents[start:stop]
        return TokenBatch(self.tokens[start:stop], self.labels[start:stop], documents)


def pack_documents(documents: Sequence[Document], pad_id: int, length: int) -> TokenBatch:
    """Documents to as few rows of `length` positions as they fit into.

    Raises:
        ValueError: a document is longer than `length`.
    """
    rows = pack([len(document.tokens) for document in documents], length)
    return lay_out([[documents[i] for i in row] for row in rows], pad_id, length)


def lay_out(rows: Sequence[Sequence[Document]], pad_id: int, length: int | None = None) -> TokenBatch:
    """Documents to rows; the last token of a document predicts nothing, padding is a document of its own.

    Args:
        rows: the documents of each row, in order.
        pad_id: token of the padding.
        length: T; the longest row by default.

    Raises:
        ValueError: a row is longer than `length`.
    """
    sizes = [sum(len(document.tokens) for document in row) for row in rows]
    width = max(sizes) if length is None else length
    if max(sizes) > width:
        raise ValueError(f"a row of {max(sizes)} tokens does not fit into {width}")
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    documents = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row):
            end = at + len(document.tokens)
            ids = torch.tensor(document.tokens, dtype=torch.int64)
            tokens[i, at:end] = ids
            counted = torch.tensor(document.targets[1:], dtype=torch.bool)
            labels[i, at : end - 1] = torch.where(counted, ids[1:], IGNORE)
            documents[i, at:end] = number
            at = end
        documents[i, at:] = len(row)
    packed = any(len(row) > 1 for row in rows)
    return TokenBatch(tokens, labels, documents if packed else None)


def even_rows(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """The same batches, padded to as many rows of as many positions each as the largest among them."""
    rows, length = (max(batch.tokens.shape[i] for batch in batches) for i in (0, 1))

    def padded(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, length - x.shape[1], 0, rows - x.shape[0]), value=value)

    return [
        TokenBatch(
            padded(batch.tokens, 0),
            padded(batch.labels, IGNORE),
            None if batch.documents is None else padded(batch.documents, PADDING),
        )
        for batch in batches
    ]
