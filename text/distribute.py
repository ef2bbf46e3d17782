"""A language model on the processes of a layout (section 3.3.2), and what its objective then sees."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..train.objective import Objective
from ..train.pipeline import Pipeline
from ..train.place import Place
from ..train.sharding import shard
from .context_parallel import own_positions, share_context
from .model import Transformer
from .parallel import require_fits
from .recompute import recompute
from .stages import cut, pipeline_of, stage_module
from .tensor_parallel import share_tensors


def distribute(model: Transformer, place: Place, row_length: int) -> Pipeline | None:
    """Changes a model in place into this process's part of it. All processes call it, with the same weights.

    Args:
        row_length: of the rows that it will train on.

    Returns: where layers are on several processes, the pipeline that runs them; the model is then only there for its
        parameters.

    Raises:
        LayoutError: the layout does not divide the model or the rows; says with which numbers.
    """
    require_fits(model.config, place.layout, row_length)
    if place.layout.pipeline == 1:
        _divide(model, model, place)
        return None
    parts = cut(model, place)
    modules = {i: stage_module(part, place) for i, part in parts.items()}
    for i, part in parts.items():
        _divide(part, modules[i], place)
    return pipeline_of(modules, model, place)


def _divide(model: Transformer, root: nn.Module, place: Place) -> None:
    """
    Args:
        root: what is called as a whole, the model or what contains it.
    """
    if place.layout.context > 1:
        share_context(model, place)
    if place.layout.tensor > 1:
        share_tensors(model, place.tensor)
    recompute(model, place.config.recompute)
    shard(root, model.layers, place, methods=["hidden"] if root is model else [])


def of_own_positions(objective: Objective, place: Place) -> Objective:
    """An objective on `TokenBatch`es of whole rows, for a model that `distribute` changed."""

    def own(model: Any, batch: Any) -> Any:
        return objective(model, own_positions(batch, place))

    return objective if place.layout.context == 1 else own
