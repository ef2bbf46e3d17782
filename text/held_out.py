"""Loss of the language model on documents that it does not train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.shards import Sample, ShardReader
from ..data.sources import SourceConfig, source_names
from ..train.objective import move
from .model import Transformer
from .objective import next_token
from .rows import Document, TokenBatch, pack_documents


@dataclass(kw_only=True)
class HeldOutConfig:
    """
    Args:
        sources: each is measured on its own; `weight` has no meaning here.
        samples: of each source at most, its first.
        row_length: tokens of a row; None: that of training.
        batch_size: rows at a time.
    """

    sources: list[SourceConfig]
    samples: int = 200
    row_length: int | None = None
    batch_size: int = 8


def held_out_loss(
    config: HeldOutConfig, encode: Callable[[Sequence[Sample]], list[list[int]]], pad_id: int, row_length: int
) -> Callable[[Transformer, int], dict[str, float]]:
    """The evaluation hook of a stage: mean cross-entropy per token of each source, in nats, as "<source>_loss".

    Args:
        encode: samples to token ids, one list for each; what is longer than a row is cut.
    """
    length = config.row_length or row_length
    batches: dict[str, list[TokenBatch]] = {}
    for name, source in zip(source_names(config.sources), config.sources, strict=True):
        reader = ShardReader(source.shards)
        samples = [reader[i] for i in range(min(config.samples, len(reader)))]
        documents = [
            Document(tokens[at : at + length], [True] * len(tokens[at : at + length]))
            for tokens in encode(samples)
            for at in range(0, len(tokens), length)
        ]
        rows = pack_documents(documents, pad_id, length)
        batches[name] = [rows.slice(at, at + config.batch_size) for at in range(0, len(rows.tokens), config.batch_size)]

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        device = model.tok_embeddings.weight.device
        losses = {}
        for name, parts in batches.items():
            sums = torch.zeros(2, dtype=torch.float64)
            for part in parts:
                loss, count, _ = next_token(model, move(part, device))
                sums += torch.stack([loss.double().cpu(), count.double().cpu()])
            losses[f"{name}_loss"] = (sums[0] / sums[1]).item()
        return losses

    return evaluate
