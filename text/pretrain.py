"""Pre-training of the language model (section 3.4): next-token prediction over packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.dialogs import dialog_sample
from ..data.shards import Sample, ShardReader
from ..data.sources import DataConfig, open_loader
from ..train.parallel import rank, world_size
from ..train.recipe import Stage, StageRecipe, train_by
from .dialog import encode_dialog
from .model import Transformer, TransformerConfig
from .model_directory import save_text
from .objective import next_token
from .rows import Document, TokenBatch, pack_documents
from .tokenizer import Tokenizer


@dataclass(kw_only=True)
class PretrainRecipe(StageRecipe):
    """
    Args:
        tokenizer: a `tokenizer.json`; "" trains one of `model.vocab_size` entries on the data's first
            `tokenizer_samples` samples.
        model: sizes of the language model.
        data: samples with a `txt` member, one document each, or dialogs, which are read as text in the chat
            format; a document longer than `row_length` is cut into pieces.
    """

    tokenizer: str = ""
    tokenizer_samples: int = 20_000
    model: TransformerConfig
    data: DataConfig = field(default_factory=DataConfig)


class TextCollator:
    """Samples to packed rows: begin of text, the text, end of text, or a dialog in the chat format; every token
    counts in the loss."""

    def __init__(self, tokenizer: Tokenizer, row_length: int):
        self.tokenizer = tokenizer
        self.row_length = row_length

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> TokenBatch:
        pieces: list[Document] = []
        for _, sample in samples:
            if "txt" in sample.members:
                tokens = [*self.tokenizer.encode(sample.text("txt"), bos=True), self.tokenizer.eos_id]
            else:
                tokens = encode_dialog(dialog_sample(sample, ()), self.tokenizer).tokens
            for start in range(0, len(tokens), self.row_length):
                piece = tokens[start : start + self.row_length]
                pieces.append(Document(piece, [True] * len(piece)))
        return pack_documents(pieces, self.tokenizer.pad_id, self.row_length)


def run(recipe: PretrainRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains and writes `run_dir/model`; returns the trainer's result."""
    torch.manual_seed(recipe.trainer.seed)
    tokenizer = prepare_tokenizer(recipe)
    model = Transformer(recipe.model)
    batch_size = recipe.trainer.micro_batch_size(world_size())
    collate = TextCollator(tokenizer, recipe.data.row_length)
    loader = open_loader(recipe.data, collate, batch_size, rank(), world_size())
    result = train_by(recipe, model, loader, next_token, run_dir)
    if rank() == 0:
        save_text(model, tokenizer, run_dir / "model")
    return result


def prepare_tokenizer(recipe: PretrainRecipe) -> Tokenizer:
    """Loads the recipe's tokenizer, or trains one; training is deterministic, so every process gets the same."""
    if recipe.tokenizer:
        return Tokenizer.load(Path(recipe.tokenizer))
    readers = [ShardReader(source.shards) for source in recipe.data.sources]
    share = recipe.tokenizer_samples // len(readers)
    samples = (reader[i] for reader in readers for i in range(min(share, len(reader))))
    return Tokenizer.train(map(_plain_text, samples), recipe.model.vocab_size)


def _plain_text(sample: Sample) -> str:
    if "txt" in sample.members:
        return sample.text("txt")
    return "\n\n".join(message.text for message in dialog_sample(sample, ()))


STAGE = Stage(PretrainRecipe, run)
