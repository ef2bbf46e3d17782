"""The language model as stages of a pipeline (section 3.3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..train.pipeline import Handed, Outcome, Pipeline, StageModule
from ..train.place import Place
from .context_parallel import own_positions
from .model import Transformer, TransformerConfig
from .objective import row_loss
from .parallel import Stage, stages
from .rows import TokenBatch, even_rows


def cut(model: Transformer, place: Place) -> dict[int, Transformer]:
    """This process's stages by their number, as models whose `hidden` runs the layers that they have. The model keeps
    what they have, under the same names as before, and cannot be run any more."""
    everything = stages(model.config, place.config)
    own = {i: everything[i] for i in range(place.at.pipeline, len(everything), place.config.pipeline)}
    parts = {i: _part(model, stage) for i, stage in own.items()}
    model.layers = nn.ModuleDict({str(i): model.layers[i] for stage in own.values() for i in stage.layers})  # type: ignore[assignment]
    if not any(_has_embedding(model.config, stage) for stage in own.values()):
        model.tok_embeddings = nn.Identity()  # type: ignore[assignment]
    if not any(stage.output for stage in own.values()):
        model.norm, model.output = nn.Identity(), None  # type: ignore[assignment]
    return parts


def _part(model: Transformer, stage: Stage) -> Transformer:
    part = Transformer.__new__(Transformer)
    nn.Module.__init__(part)
    part.config = model.config
    has_embedding = _has_embedding(model.config, stage)
    part.tok_embeddings = model.tok_embeddings if has_embedding else nn.Identity()  # type: ignore[assignment]
    part.layers = nn.ModuleList(model.layers[i] for i in stage.layers)
    part.norm = model.norm if stage.output else nn.Identity()  # type: ignore[assignment]
    part.output = model.output if stage.output else None
    return part


def _has_embedding(config: TransformerConfig, stage: Stage) -> bool:
    return stage.embedding or (stage.output and config.tie_embeddings)


def stage_module(part: Transformer, place: Place) -> StageModule:
    def run(part: Transformer, x: Tensor | None, batch: TokenBatch) -> Tensor:
        if x is not None:
            return part.hidden(embeddings=x, documents=batch.documents)
        return part.hidden(own_positions(batch, place).tokens, documents=batch.documents)

    return StageModule(part, run)


def pipeline_of(modules: dict[int, StageModule], model: Transformer, place: Place) -> Pipeline:
    """The objective of packed rows through the stages."""

    def objective(part: Transformer, hidden: Tensor, batch: TokenBatch) -> Outcome:
        return row_loss(part, hidden, own_positions(batch, place).labels)

    # A micro-batch of dialogs has as many rows as they need.
    return Pipeline(place, modules, objective, rows_handed(model, place), even_rows)


def rows_handed(model: Transformer, place: Place) -> Callable[[TokenBatch], Handed]:
    """What tells the shapes that stages hand on for a batch of whole rows."""
    dtype = torch.bfloat16 if place.config.gather == "bfloat16" else next(model.parameters()).dtype
    dim = model.config.dim

    def handed(batch: TokenBatch) -> Handed:
        rows, length = batch.tokens.shape
        own = length // place.layout.context
        return Handed((rows, own // place.layout.tensor, dim), (rows, own, dim), dtype)

    return handed
