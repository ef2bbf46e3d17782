"""A language model on the processes of a layout (section 3.3.2), and what its objective then sees."""

from __future__ import annotations

from typing import Any

from ..train import parallel
from ..train.objective import Objective
from ..train.place import Place
from ..train.sharding import shard
from .context_parallel import own_positions, share_context
from .model import Transformer
from .parallel import require_fits
from .recompute import recompute
from .tensor_parallel import share_tensors


def distribute(model: Transformer, place: Place, row_length: int) -> None:
    """Changes a model in place into this process's part of it. All processes call it, with the same weights.

    Args:
        row_length: of the rows that it will train on.

    Raises:
        LayoutError: the layout does not divide the model or the rows; says with which numbers.
    """
    layout = place.layout
    require_fits(model.config, layout, row_length)
    if layout.context > 1:
        share_context(model, place)
    if layout.tensor > 1:
        share_tensors(model, place.tensor)
    recompute(model, place.config.recompute)
    shard(model, model.layers, place, methods=["hidden"])


def of_own_positions(objective: Objective, place: Place) -> Objective:
    """An objective on `TokenBatch`es of whole rows, for a model that `distribute` changed."""

    def own(model: Any, batch: Any) -> Any:
        return objective(model, own_positions(batch, place))

    return objective if place.layout.context == 1 else own
