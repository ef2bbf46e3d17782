"""Loss of the language model on documents that it does not train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.packing import pack
from ..data.shards import ShardReader
from ..data.sources import SourceConfig, source_names
from ..train.objective import move
from ..train.place import Place
from .context_parallel import own_chunks
from .distribute import DistributedModel
from .loss import token_losses
from .model import Transformer
from .row_loader import Encode
from .rows import IGNORE, Document, TokenBatch, lay_out


@dataclass(kw_only=True)
class HeldOutConfig:
    """
    Args:
        sources: each is measured on its own; `weight` has no meaning here.
        samples: of each source at most, its first.
        row_length: tokens of a row, at least 2; None: that of training. Longer documents are cut.
        batch_size: rows at a time.
    """

    sources: list[SourceConfig]
    samples: int = 200
    row_length: int | None = None
    batch_size: int = 8


class HeldOut:
    """Documents of held-out sources, ready to be measured; called as the evaluation hook of a stage it gives the mean
    cross-entropy per token of each source, in nats, as "<source>_loss".

    Args:
        encode: samples to token ids, one list for each.
        pad_id: token of the padding.
        row_length: where the config has none.
    """

    def __init__(self, config: HeldOutConfig, encode: Encode, pad_id: int, row_length: int):
        length = config.row_length or row_length
        self._counts: dict[str, int] = {}
        self._batches: dict[str, list[tuple[TokenBatch, Tensor]]] = {}
        for name, source in zip(source_names(config.sources), config.sources, strict=True):
            reader = ShardReader(source.shards)
            pieces, owners = [], []
            for owner, tokens in enumerate(encode([reader[i] for i in range(min(config.samples, len(reader)))])):
                # A piece but the first begins with the last token of the one before: every token is predicted once.
                for start in range(0, max(1, len(tokens) - 1), length - 1):
                    piece = tokens[start : start + length]
                    pieces.append(Document(piece, [True] * len(piece)))
                    owners.append(owner)
            self._counts[name] = owners[-1] + 1
            rows = pack([len(piece.tokens) for piece in pieces], length)
            self._batches[name] = []
            for start in range(0, len(rows), config.batch_size):
                part = rows[start : start + config.batch_size]
                batch = lay_out([[pieces[i] for i in row] for row in part], pad_id, length)
                owner = torch.full_like(batch.labels, -1)
                for i, row in enumerate(part):
                    of_row = [torch.full((len(pieces[j].tokens),), owners[j]) for j in row]
                    owner[i, : sum(map(len, of_row))] = torch.cat(of_row)
                self._batches[name].append((batch, owner))

    def __call__(self, model: Transformer | DistributedModel, step: int) -> dict[str, float]:
        losses = {}
        for name, sums in self.document_losses(model).items():
            loss, count = sums.sum(0).tolist()
            losses[f"{name}_loss"] = loss / count
        return losses

    @torch.no_grad()
    def document_losses(self, model: Transformer | DistributedModel) -> dict[str, Tensor]:
        """For each source (documents, 2) float64: the summed loss of every document and its number of targets. Of a
        distributed model all processes call it, and all get the same."""
        if isinstance(model, Transformer):
            model = DistributedModel(model, Place(), None)
        device = next(model.model.parameters()).device
        found = {}
        for name, batches in self._batches.items():
            sums = torch.zeros(self._counts[name], 2, dtype=torch.float64)
            for batch, owner in batches:
                output = model.hidden(move(batch, device))
                if output is None:
                    continue
                last, hidden, own = output
                counted = own.labels != IGNORE
                losses = token_losses(hidden[counted], last.output_weight, own.labels[counted]).cpu().double()
                owners = own_chunks(owner, model.place)[counted.cpu()]
                sums.index_add_(0, owners, torch.stack([losses, torch.ones_like(losses)], 1))
            found[name] = model.sum(sums.to(device)).cpu()
        return found
