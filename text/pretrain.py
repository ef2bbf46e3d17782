"""Initial pre-training of the language model (section 3.4.1): next-token prediction over packed documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.dialogs import dialog_sample
from ..data.shards import Sample, ShardReader
from ..train.recipe import Stage
from .model import TransformerConfig
from .model_directory import save_text
from .plan import plan_pretraining
from .row_stage import RowRecipe, train_on_rows
from .tokenizer import Tokenizer
from .weights import DrawnWeights


@dataclass(kw_only=True)
class PretrainRecipe(RowRecipe):
    """
    Args:
        tokenizer: a `tokenizer.json`; "" trains one of `model.vocab_size` entries on the data's first
            `tokenizer_samples` samples.
        model: sizes of the language model.
    """

    tokenizer: str = ""
    tokenizer_samples: int = 20_000
    model: TransformerConfig


def run(recipe: PretrainRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains and writes `run_dir/model`; returns the trainer's result. Errors: see `train_on_rows`."""
    tokenizer = prepare_tokenizer(recipe)
    part, result = train_on_rows(recipe, DrawnWeights(recipe.model, recipe.trainer.seed), tokenizer, run_dir)
    save_text(part.weights(), tokenizer, run_dir / "model")
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


STAGE = Stage(PretrainRecipe, run, plan_pretraining)
