"""What every stage that trains the language model on packed rows has in common: the recipe and the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.dialogs import dialog_sample
from ..data.shards import Sample
from ..data.sources import DataConfig
from ..train.place import Place
from ..train.recipe import StageRecipe, train_by
from .dialog import encode_dialog
from .distribute import DistributedModel, of_own_positions, share_out
from .held_out import HeldOut, HeldOutConfig
from .model import Transformer
from .objective import Metrics, row_loss
from .row_loader import Encode, Phase, PlannedPhase, RowLoader, plan_phases, with_ramp
from .rows import TokenBatch
from .tokenizer import Tokenizer
from .weights import Weights


@dataclass(kw_only=True)
class RowRecipe(StageRecipe):
    """`trainer.batch_size` is in rows.

    Args:
        data: samples with a `txt` member, one document each, or dialogs, which are read as text in the chat
            format; a document longer than `row_length` is cut into pieces.
        window: documents that are packed together; more of them leave less padding.
        phases: changes of row length, batch size and mixture, by tokens seen.
        held_out: what to measure at `trainer.evaluate_every` and at the end.
    """

    data: DataConfig = field(default_factory=DataConfig)
    window: int = 1024
    phases: list[Phase] = field(default_factory=list)
    held_out: HeldOutConfig | None = None


def train_on_rows(
    recipe: RowRecipe, weights: Weights, tokenizer: Tokenizer, run_dir: Path
) -> tuple[DistributedModel, dict[str, Any]]:
    """Trains a language model on packed rows as the recipe says.

    Args:
        weights: to start from.

    Returns: this process's part of the model that results, and the trainer's result.

    Raises:
        ValueError: see `plan_phases`; rows are longer than `model.max_seq_len`.
        LayoutError: `recipe.parallel` does not divide the processes, the model or the rows.
    """
    phases = plan_phases(recipe.phases, recipe.trainer, recipe.data)
    lengths = {phase.row_length for phase in phases}
    if max(lengths) > weights.config.max_seq_len:
        raise ValueError(
            f"rows of {max(lengths)} tokens are longer than model.max_seq_len ({weights.config.max_seq_len})"
        )
    recipe = dataclasses.replace(recipe, trainer=with_ramp(recipe.trainer, phases))
    place = Place(recipe.parallel)
    encode = document_encoder(tokenizer)
    measured = set() if recipe.held_out is None else {recipe.held_out.row_length or recipe.data.row_length}
    part = share_out(weights, place, lengths | measured)
    evaluate = None
    if recipe.held_out is not None:
        held_out = HeldOut(recipe.held_out, encode, tokenizer.pad_id, recipe.data.row_length)
        evaluate = partial(_measure, held_out, part)
    loader = RowLoader(
        recipe.data,
        phases,
        encode,
        tokenizer.pad_id,
        window=recipe.window,
        rank=place.data,
        world_size=place.layout.data,
        fill=not place.replicas_alone,
    )
    objective = of_own_positions(next_token_of_rows, place)
    flops = flops_of_rows(weights.outline(), phases)
    try:
        return part, train_by(recipe, part.model, loader, objective, run_dir, evaluate, flops, place, part.pipeline)
    finally:
        loader.close()


def _measure(held_out: HeldOut, part: DistributedModel, _: Transformer, step: int) -> dict[str, float]:
    return held_out(part, step)


def flops_of_rows(model: Transformer, phases: Sequence[PlannedPhase]) -> Callable[[int], float]:
    """The operations of an update, counted as `text.plan.plan_rows` does: three forward passes, attention at half the
    row as if no row were packed, padding included."""

    per_token = {length: 3.0 * model.flops_per_token(length / 2) for length in {p.row_length for p in phases}}

    def flops(step: int) -> float:
        phase = [phase for phase in phases if phase.from_step <= step][-1]
        return phase.tokens_per_step * per_token[phase.row_length]

    return flops


def next_token_of_rows(model: Transformer, batch: TokenBatch) -> tuple[Tensor, Tensor, Metrics]:
    """The objective of rows; see `row_loss`."""
    return row_loss(model, model.hidden(batch.tokens, documents=batch.documents), batch.labels)


def document_encoder(tokenizer: Tokenizer) -> Encode:
    """Samples to tokens: begin of text, the text, end of text; or a dialog in the chat format."""

    def encode(samples: Sequence[Sample]) -> list[list[int]]:
        texts = [i for i, sample in enumerate(samples) if "txt" in sample.members]
        encoded = tokenizer.encode_batch([samples[i].text("txt") for i in texts], bos=True)
        as_text = {i: [*tokens, tokenizer.eos_id] for i, tokens in zip(texts, encoded, strict=True)}
        return [
            as_text[i] if i in as_text else encode_dialog(dialog_sample(sample, ()), tokenizer).tokens
            for i, sample in enumerate(samples)
        ]

    return encode
