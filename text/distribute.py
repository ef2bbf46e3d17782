"""A language model on the processes of a layout (section 3.3.2), and what its objective then sees."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..train import parallel
from ..train.objective import Objective
from ..train.pipeline import Pipeline
from ..train.place import Place
from ..train.portions import SharedTensors, portions
from ..train.sharding import shard
from .compiled import compile_layers
from .context_parallel import own_positions, share_context
from .float8 import convert_to_float8
from .interchange.directory_weights import TrainedWeights
from .model import Transformer
from .parallel import require_fits
from .recompute import recompute
from .rows import TokenBatch
from .stages import cut, pipeline_of, stage_module
from .tensor_parallel import share_tensors
from .weights import Weights


@dataclass
class DistributedModel:
    """This process's part of a language model.

    Args:
        model: its parameters; where there is no pipeline, what runs.
        pipeline: where layers are on several processes, what runs them.
        place: this process's.
    """

    model: Transformer
    place: Place
    pipeline: Pipeline | None

    def hidden(self, batch: TokenBatch) -> tuple[Transformer, Tensor, TokenBatch] | None:
        """What stands before the output projection, for measuring: the model (or stage) with the projection, hidden
        states (B, T / context, D) of this process's positions, and the batch of those. None where another process of
        the pipeline has it. All processes of a `tensor`, `context` and `pipeline` group call it with the same batch.
        """
        own = own_positions(batch, self.place)
        if self.pipeline is None:
            return self.model, self.model.hidden(own.tokens, documents=own.documents), own
        found = self.pipeline.last_output(batch, next(self.model.parameters()).device)
        return None if found is None else (*found, own)

    def weights(self) -> TrainedWeights:
        """All of them, for files. All processes call it."""
        with torch.device("meta"):
            names = list(Transformer(self.model.config).state_dict())
        return TrainedWeights(self.model.config, SharedTensors(dict(self.model.named_parameters()), self.place, names))

    def sum(self, values: Tensor) -> Tensor:
        """Adds up, in place, what the processes of a `context` and `pipeline` group measured on their positions."""
        if self.place.layout.context > 1:
            dist.all_reduce(values, group=self.place.group("context"))
        if self.place.layout.pipeline > 1:
            dist.all_reduce(values, group=self.place.group("pipeline"))
        return values


def distribute(model: Transformer, place: Place) -> Pipeline | None:
    """Changes a model in place into this process's part of it; see `DistributedModel`.

    Returns: where layers are on several processes, the pipeline that runs them; the model is then only there for its
        parameters.

    Raises:
        LayoutError: there are more stages than layers.
    """
    if place.layout.pipeline == 1:
        divide(model, model, place)
        return None
    parts = cut(model, place)
    modules = {i: stage_module(part, place) for i, part in parts.items()}
    for i, part in parts.items():
        divide(part, modules[i], place, embeds=i == 0)
    return pipeline_of(modules, model, place)


def share_out(weights: Weights, place: Place, row_lengths: Collection[int]) -> DistributedModel:
    """Makes this process's part of a language model, on its device. No process ever has memory for more than that and
    one tensor. All processes call it.

    Args:
        row_lengths: of all rows that it will train on.

    Raises:
        LayoutError: the layout does not divide the model or the rows; says with which numbers.
    """
    for length in row_lengths:
        require_fits(weights.config, place.layout, length)
    own = weights.outline()
    pipeline = distribute(own, place)
    read_own(weights, own, (own,) if pipeline is None else pipeline.stages.values())
    return DistributedModel(own, place, pipeline)


def read_own(weights: Weights, model: Transformer, modules: Iterable[nn.Module]) -> None:
    """Gives this process's part of a model on the meta device its memory and weights. All processes call it.

    Args:
        modules: that have its tensors: the model, or in a pipeline the stages.
    """
    for module in modules:
        module.to_empty(device=parallel.device())
    kept = portions(dict(model.named_parameters()))
    parallel.on_each(lambda: weights.read(kept))


def divide(model: Transformer, root: nn.Module, place: Place, embeds: bool = True) -> None:
    """Shares out the tensors of a model, or of a stage of a pipeline, in place.

    Args:
        root: what is called as a whole, the model or what contains it.
        embeds: whether it is given tokens; else what it may have of the embedding is its output projection.
    """
    if place.layout.context > 1:
        share_context(model, place)
    if place.config.float8 != "none":
        convert_to_float8(model, place.config.float8, parallel.device())
    if place.layout.tensor > 1:
        share_tensors(model, place.tensor)
    recompute(model, place.config.recompute)
    if place.config.compile != "none":
        compile_layers(model, place.config.compile)
    # By itself: its gradient comes after that of everything else, which is done once the layers' input has one.
    embedding = [model.tok_embeddings] if embeds else []
    shard(root, model.layers, place, kept=embedding, methods=["hidden", "embed"] if root is model else [])


def of_own_positions(objective: Objective, place: Place) -> Objective:
    """An objective on `TokenBatch`es of whole rows, for a model that `distribute` changed."""

    def own(model: Any, batch: Any) -> Any:
        return objective(model, own_positions(batch, place))

    return objective if place.layout.context == 1 else own
