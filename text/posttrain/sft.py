"""Supervised fine-tuning on dialogs (section 4.1.3): cross-entropy on the assistant's tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.dialogs import dialog_sample
from ...data.shards import Sample
from ...data.sources import DataConfig, open_loader
from ...train.place import Place
from ...train.recipe import Stage, StageRecipe, train_by
from ..dialog import encode_dialog
from ..distribute import of_own_positions, share_out
from ..model_directory import open_text, save_text
from ..objective import next_token
from ..rows import Document, TokenBatch, pack_documents
from ..tokenizer import Tokenizer


@dataclass(kw_only=True)
class SFTRecipe(StageRecipe):
    """
    Args:
        init: model directory of the pre-trained language model.
        data: dialog samples (member `json`).
    """

    init: str
    data: DataConfig = field(default_factory=DataConfig)


class DialogTextCollator:
    """Dialogs without media to packed rows.

    Raises:
        ValueError: a dialog is longer than a row, or holds media; names the sample.
    """

    def __init__(self, tokenizer: Tokenizer, row_length: int):
        self.tokenizer = tokenizer
        self.row_length = row_length

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> TokenBatch:
        documents: list[Document] = []
        for _, sample in samples:
            dialog = encode_dialog(dialog_sample(sample, ()), self.tokenizer)
            if len(dialog.tokens) > self.row_length:
                where = f"{sample.shard}: sample {sample.key}"
                raise ValueError(f"{where}: {len(dialog.tokens)} tokens do not fit into rows of {self.row_length}")
            documents.append(Document(dialog.tokens, dialog.targets))
        return pack_documents(documents, self.tokenizer.pad_id, self.row_length)


def run(recipe: SFTRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains and writes `run_dir/model`; returns the trainer's result.

    Raises:
        LayoutError: `recipe.parallel` does not divide the processes, the model or the rows.
    """
    weights, tokenizer = open_text(recipe.init)
    place = Place(recipe.parallel)
    batch_size = recipe.trainer.micro_batch_size(place.layout.data)
    collate = DialogTextCollator(tokenizer, recipe.data.row_length)
    loader = open_loader(
        recipe.data, collate, batch_size, place.data, place.layout.data, drop_last=not place.replicas_alone
    )
    part = share_out(weights, place, [recipe.data.row_length])
    result = train_by(
        recipe, part.model, loader, of_own_positions(next_token, place), run_dir, place=place, pipeline=part.pipeline
    )
    save_text(part.weights(), tokenizer, run_dir / "model")
    return result


STAGE = Stage(SFTRecipe, run)
