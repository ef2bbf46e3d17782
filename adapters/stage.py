"""What every stage that trains adapters on dialogs has in common: the recipe and the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.sources import DataConfig, open_loader
from ..text.parallel import row_unit
from ..text.weights import Weights
from ..train.objective import Objective
from ..train.place import Place
from ..train.recipe import StageRecipe, train_by
from .batching import DialogCollator, Port
from .compose import ComposedModel
from .distribute import share_out
from .model_directory import attach_adapters, open_model, save
from .objective import next_token


@dataclass(kw_only=True)
class DialogDataConfig(DataConfig):
    """Dialog samples with media.

    Args:
        turns: how dialogs of several turns become documents; see `herdkit.adapters.batching.Turns`.
        packed: several samples share a row where they fit.
    """

    turns: Literal["conversation", "independent", "alternate"] = "conversation"
    packed: bool = False


@dataclass(kw_only=True)
class AdapterRecipe(StageRecipe):
    """
    Args:
        init: model directory to start from.
        attach: model directories whose further adapters join it; see
            `herdkit.adapters.model_directory.attach_adapters`.
        data: dialogs with the media that the attached adapters take.
        freeze: names are `text.<parameter>` and `<modality>.<parameter>`.
    """

    init: str
    attach: list[str] = field(default_factory=list)
    data: DialogDataConfig = field(default_factory=DialogDataConfig)


def initial_model(recipe: AdapterRecipe) -> tuple[ComposedModel, Weights]:
    """The model of `recipe.init`, with the adapters of `recipe.attach`, as `open_model` gives it, in float32 as
    training needs it."""
    model, weights = open_model(recipe.init)
    for path in recipe.attach:
        attach_adapters(model, path, weights=weights)
    return model, weights


def train_on_dialogs(
    recipe: AdapterRecipe,
    model: ComposedModel,
    weights: Weights,
    run_dir: Path,
    objective: Objective = next_token,
    collator: Callable[..., DialogCollator] = DialogCollator,
) -> dict[str, Any]:
    """Trains a composed model on the recipe's dialogs and writes `run_dir/model`; the trainer's result.

    Args:
        model: with every adapter attached that the stage needs.
        weights: of its language model.
        objective: loss of a batch; by default next-token prediction of the assistant's answers. Other than a
            `herdkit.adapters.objective.DialogObjective`, it can share the storage of weights alone.
        collator: makes the batches that the objective takes.

    Raises:
        ValueError: the model has no tokenizer.
        LayoutError: `recipe.parallel` does not divide the processes, the language model or the rows, or the objective
            or an adapter cannot do with it.
    """
    if model.tokenizer is None:
        raise ValueError(f"{recipe.init}: the model has no tokenizer")
    place = Place(recipe.parallel)
    data = recipe.data
    ports = [Port.of(adapter) for adapter in model.adapters.values()]
    unit = row_unit(place.layout)
    collate = collator(
        model.tokenizer, ports, row_length=data.row_length, turns=data.turns, packed=data.packed, row_unit=unit
    )
    batch_size = recipe.trainer.micro_batch_size(place.layout.data)
    loader = open_loader(
        data,
        collate,
        batch_size,
        place.data,
        place.layout.data,
        lengths=collate.lengths,
        drop_last=not place.replicas_alone,  # every process has to run the layers that it stores a part of
    )
    part = share_out(model, weights, place, data.row_length, objective)
    result = train_by(recipe, part.model, loader, part.objective, run_dir, place=place, pipeline=part.pipeline)
    save(model, run_dir / "model", shared=part.tensors())
    return result
