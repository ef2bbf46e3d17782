"""What the recipe of every stage has in common, and the call that trains by it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from . import parallel
from .config import FreezeRule, OptimizerConfig, RecipeError, ScheduleConfig, TrainerConfig, as_dict
from .layout import LayoutError, ParallelConfig
from .objective import Loader, Objective
from .pipeline import Pipeline
from .place import Place
from .plan import Cluster, Hardware
from .trainer import Evaluate, FlopsOfUpdate, train

GROUP = "herdkit.stages"


@dataclass(kw_only=True)
class StageRecipe:
    """A stage adds its model and data.

    Args:
        stage: the name under which the stage is registered.
        root: a folder that other keys of the recipe may write as `${root}`.
        freeze: what trains, see `FreezeRule`.
        parallel: what processes share of the model and its rows; a stage says what it can do of it.
    """

    stage: str
    root: str = "."
    freeze: list[FreezeRule] = field(default_factory=list)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    trainer: TrainerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def train_by(
    recipe: StageRecipe,
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    run_dir: Path,
    evaluate: Evaluate | None = None,
    flops: FlopsOfUpdate | None = None,
    place: Place | None = None,
    pipeline: Pipeline | None = None,
) -> dict[str, Any]:
    """`train` with everything that the recipe says, which is recorded in the run directory, on this process's device;
    the model stays there.

    Raises:
        LayoutError: the recipe has a layout of which the stage made nothing.
    """
    if place is None and recipe.parallel != ParallelConfig():
        raise LayoutError("tensor", f"stage {recipe.stage!r} trains replicas alone; leave 'parallel' out")
    return train(
        model.to(parallel.device()),
        loader,
        objective,
        trainer=recipe.trainer,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        freeze=recipe.freeze,
        run_dir=run_dir,
        description=recipe.stage,
        resolved_recipe=as_dict(recipe),
        evaluate=evaluate,
        flops=flops,
        place=place,
        pipeline=pipeline,
    )


@dataclass(frozen=True)
class Stage:
    """A way to train, under the name that recipes give in `stage`; packages declare theirs in the entry-point
    group `herdkit.stages`.

    Args:
        recipe: the dataclass that its recipes are read into.
        run: called as `run(recipe, run_dir)`; trains, writes what it made into `run_dir`, and returns the
            trainer's result.
        plan: called as `plan(recipe, hardware, model)`, where `model` names the preset that a stage goes on with, or is
            None; what the recipe costs there, as plain JSON values. None: nobody knows.
    """

    recipe: type[StageRecipe]
    run: Callable[[Any, Path], dict[str, Any]]
    plan: Callable[[Any, Hardware | Cluster, str | None], dict[str, Any]] | None = None


def find_stage(name: str) -> Stage:
    """
    Raises:
        RecipeError: no installed package declares a stage of that name; names the nearest one.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        near = difflib.get_close_matches(name, points, 1)
        known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(points)) or 'none'}"
        raise RecipeError(
            f"stage: no installed package declares a stage {name!r}; {known} (What an editable install declares is "
            "known once it is installed again.)"
        )
    return points[name].load()


def read_stage_name(path: str | Path) -> str:
    """The `stage` of a recipe file, needed before the rest of the recipe can be checked.

    Raises:
        RecipeError: no such file, no YAML, or no `stage` in it.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise RecipeError(f"{path}: a recipe needs the key 'stage'")
    return content["stage"]
