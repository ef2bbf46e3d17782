"""A composed model on the processes of a layout (sections 3.3.2 and 7.3).

The language model is shared out as by itself. Interleaved layers are stored in shards where the layout has them, and
every process runs them for the positions that it has; in a pipeline each stage has those that run before its own
layers. Encoders every process has whole, in every stage whose layers read from them, and runs them for its share of the
inputs of its rows, or of their tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor, all_gather_tensor_autograd
from torch.nn import functional as F

from ..text.context_parallel import own_chunks, own_positions
from ..text.distribute import distribute, divide, read_own
from ..text.model import Transformer
from ..text.parallel import Stage, require_fits, stages
from ..text.rows import even_rows
from ..text.stages import cut, rows_handed
from ..text.weights import Weights
from ..train import parallel
from ..train.layout import Layout, LayoutError
from ..train.objective import Objective, Outcome
from ..train.pipeline import Pipeline, StageModule
from ..train.place import Place
from ..train.portions import SharedTensors, WholeTensors
from ..train.sharding import shard_block
from .batching import Batch
from .compose import ComposedModel
from .contract import Contribution, InterleavedLayer, ModalityBatch, Placements
from .deferred import read_layers
from .objective import DialogObjective, next_token


@dataclass
class DistributedComposition:
    """This process's part of a composed model.

    Args:
        model: its parameters; where there is no pipeline, what runs.
        pipeline: where layers are on several processes, what runs them.
        place: this process's.
        names: of the tensors of the language model, "text", and of each adapter by modality, in their order.
        objective: for `model` and batches of whole rows.
    """

    model: ComposedModel
    pipeline: Pipeline | None
    place: Place
    names: Mapping[str, Sequence[str]]
    objective: Objective

    def tensors(self) -> dict[str, WholeTensors]:
        """All of them, for files, by part: "text" and the modalities. All processes call it."""
        return {
            name: SharedTensors(getattr(self.model, name).state_dict(), self.place, names)
            for name, names in self.names.items()
        }


def share_out(
    model: ComposedModel, weights: Weights, place: Place, row_length: int, objective: Objective = next_token
) -> DistributedComposition:
    """Makes this process's part of a composed model. None of them ever has memory for more of the language model than
    its part and one tensor, nor, of layers that have none yet (`herdkit.adapters.deferred`), than its part and one
    layer. All else of the adapters all of them have whole before, with the same weights. All processes call it.

    Args:
        model: its language model may be on the meta device. Afterwards it is of no use but to tell sizes.
        weights: of the language model.
        row_length: of the longest rows; others are multiples of `herdkit.text.parallel.row_unit`.
        objective: a `DialogObjective` sees of a batch what this process has of it; any other sees it all, and allows
            layouts that share the storage of weights alone.

    Raises:
        LayoutError: the layout does not divide the language model or the rows, says with which numbers; or it divides
            what an adapter or the objective reads.
    """
    require_adapters_fit(model, place.layout)
    if isinstance(objective, DialogObjective):
        objective.require_fits(place)
    else:
        place.require_storage_alone("this objective")
    names = {name: list(part.state_dict()) for name, part in (("text", model.text), *model.adapters.items())}
    if place.replicas_alone:
        distribute(model.text, place)
        if model.text.tok_embeddings.weight.is_meta:
            read_own(weights, model.text, [model.text])
        _read_layers(model)
        return DistributedComposition(model, None, place, names, objective)
    require_fits(model.text.config, place.layout, row_length)
    text = _outlined(model.text, weights)
    _divide_layers(model, place)
    part, pipeline = ComposedPart(model, text, place), None
    if place.layout.pipeline == 1:
        distribute(text, place)
        read_own(weights, text, [text])
    else:
        parts = cut(text, place)
        assert isinstance(objective, DialogObjective)
        pipeline = _pipeline_of(model, text, parts, place, objective)
        read_own(weights, text, parts.values())
    _read_layers(model)
    return DistributedComposition(part, pipeline, place, names, _of_own_positions(objective, place))


def _read_layers(model: ComposedModel) -> None:
    layers = [layer for adapter in model.adapters.values() for layer in adapter.interleaved().values()]
    parallel.on_each(lambda: read_layers(layers, parallel.device()))


def _outlined(text: Transformer, weights: Weights) -> Transformer:
    """The model without memory, of which the same is frozen."""
    outline = weights.outline()
    for name, parameter in outline.named_parameters():
        parameter.requires_grad_(text.get_parameter(name).requires_grad)
    return outline.train(text.training)


def require_adapters_fit(model: ComposedModel, layout: Layout) -> None:
    """
    Raises:
        LayoutError: an adapter reads weights of the language model, which no process has whole.
    """
    for name, adapter in model.adapters.items():
        for dimension in ("tensor", "pipeline"):
            if "text" in adapter.requires and getattr(layout, dimension) > 1:
                raise LayoutError(dimension, f"the adapter {name!r} reads weights of the language model, all of them")
        if "embeddings" in adapter.requires and adapter.interleaved() and layout.pipeline > 1:
            raise LayoutError("pipeline", f"the adapter {name!r} reads embeddings, which the first stage alone has")


class ComposedPart(ComposedModel):
    """What one process has of a composed model, or, in a pipeline, of one of its stages.

    Args:
        model: the whole one, for its adapters.
        text: this process's part of the language model.
        stage: of a pipeline.
    """

    def __init__(self, model: ComposedModel, text: Transformer, place: Place, stage: Stage | None = None):
        super().__init__(text, model.tokenizer)
        self.place, self.stage = place, stage
        for name, adapter in model.adapters.items():
            self.add_module(name, adapter)
            self.modalities.append(name)

    def columns(self, length: int, device: torch.device) -> Tensor:
        layout, at = self.place.layout, self.place.at
        own = own_chunks(torch.arange(length * layout.context, device=device)[None], self.place)[0]
        return own.chunk(layout.tensor)[at.tensor]

    def embed(self, tokens: Tensor) -> Tensor:
        embeddings = super().embed(tokens)
        # The backward pass gathers what is stored in shards: it has to reach every layer on every process, whatever is
        # frozen and wherever inputs stand.
        return embeddings.requires_grad_() if torch.is_grad_enabled() else embeddings

    def contribution(self, modality: str, batch: ModalityBatch) -> Contribution:
        own, number = self._own(modality, batch)
        group = self.place.group("row")
        return own if number is None or group is None else _gathered(own, group, number)

    def own_contribution(self, modality: str, batch: ModalityBatch) -> Contribution:
        return self._own(modality, batch)[0]

    def _own(self, modality: str, batch: ModalityBatch) -> tuple[Contribution, int | None]:
        """What an adapter gives for this process's inputs, and of how many these are a share; None where they are all
        of them."""
        group = self.place.group("row")
        if group is None or (processes := dist.get_world_size(group)) == 1:
            return super().own_contribution(modality, batch), None
        count = len(next(iter(batch.tensors.values())))
        adapter = self.adapters[modality]
        # Whole inputs need no exchange within the encoder; where they do not come out even, their tokens do.
        if count % processes and (shared := adapter.shared(group, **self.required(modality))) is not None:
            with shared:
                given = super().own_contribution(modality, batch)
            return _counted(given, torch.full((count,), dist.get_rank(group) == 0)), None
        share = -(-count // processes)
        first = dist.get_rank(group) * share
        # Where the inputs do not come out even, the last one is encoded more than once, and used once.
        own = torch.arange(first, first + share)
        tensors = {name: tensor[own.clamp(max=count - 1).to(tensor.device)] for name, tensor in batch.tensors.items()}
        given = super().own_contribution(modality, dataclasses.replace(batch, tensors=tensors))
        return _counted(given, own < count), count

    def contributions(
        self, inputs: Mapping[str, ModalityBatch], known: Mapping[str, Contribution]
    ) -> dict[str, tuple[Contribution, Placements]]:
        found = super().contributions(inputs, known)
        reading = [name for name in self.modalities if self.interleaved(name)]
        if self.place.storage is None or not reading:
            return found
        # Layers in shards run, forward and backward, on all processes or none. Where there is nothing to read they are
        # given a zero that no position sees.
        dtype = next(self.text.parameters()).dtype
        own = [found[name][0].memory if name in found else None for name in reading]
        widths = torch.tensor([0 if memory is None else memory.shape[-1] for memory in own], device=parallel.device())
        dist.all_reduce(widths, op=dist.ReduceOp.MAX, group=self.place.group("data"))
        for name, memory, width in zip(reading, own, widths.tolist(), strict=True):
            if memory is None and width:
                nowhere = torch.empty(0, dtype=torch.int64, device=widths.device)
                memory = torch.zeros(1, 1, width, dtype=dtype, device=widths.device)
                found[name] = Contribution(memory=memory), Placements(nowhere, nowhere, nowhere, nowhere, nowhere)
            if memory is not None and torch.is_grad_enabled() and not memory.requires_grad:
                memory.requires_grad_()
        return {name: found[name] for name in self.modalities if name in found}

    def adapter_loss(self, given: Iterable[Contribution]) -> Outcome | None:
        found = super().adapter_loss(given)
        if found is None or self.place.layout.tensor == 1:
            return found
        # Of a `tensor` group one process tells what it found: it has to know of the others' inputs.
        loss, count, metrics = found
        found_here = [torch.as_tensor(x) for pair in metrics.values() for x in pair]
        sums = torch.stack([x.double() for x in (*found_here, loss.detach())])
        dist.all_reduce(sums, group=self.place.group("tensor"))
        *parts, total = sums
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return loss + (total - loss.detach()).to(loss.dtype), count, dict(zip(metrics, pairs, strict=True))

    def interleaved(self, modality: str) -> Mapping[int, InterleavedLayer]:
        layers = super().interleaved(modality)
        if self.stage is None:
            return layers
        return {i - self.stage.layers.start: layer for i, layer in layers.items() if i in self.stage.layers}


def _of_own_positions(objective: Objective, place: Place) -> Objective:
    def own(model: ComposedModel, batch: Batch) -> Outcome:
        return objective(model, dataclasses.replace(batch, rows=own_positions(batch.rows, place)))

    return objective if place.layout.context == 1 else own


def _counted(given: Contribution, counts: Tensor) -> Contribution:
    """With losses of those inputs alone that count; (N,) bool. The others have gradients of zero: what all processes
    run together in the backward pass, all have to come through."""
    losses = {}
    for name, loss in given.losses.items():
        one = counts.to(loss.values.device)
        losses[name] = dataclasses.replace(loss, values=loss.values * one, counts=loss.counts * one)
    return dataclasses.replace(given, losses=losses)


def _gathered(own: Contribution, group: dist.ProcessGroup, count: int) -> Contribution:
    """The contributions of all processes of a group as one, for so many inputs, but for the losses: of its own."""
    soft, memory, mask = own.soft_tokens, own.memory, own.memory_mask
    if soft is not None:
        soft = all_gather_tensor_autograd(_as_long_as_others(soft, group), 0, group)[:count]
    if memory is not None:
        if mask is None:
            mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        # As bytes: not every library of collectives takes truth values.
        mask = all_gather_tensor(_as_long_as_others(mask.to(torch.uint8), group), 0, group)[:count].bool()
        # Its gradients add up over the processes: in float32 (section 3.3.2).
        memory = memory.to(torch.promote_types(memory.dtype, torch.float32))
        memory = all_gather_tensor_autograd(_as_long_as_others(memory, group), 0, group)[:count]
    return Contribution(soft, memory, mask, own.losses)


def _as_long_as_others(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n, L, ...) padded with zeros to the greatest L of the group."""
    length = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX, group=group)
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, int(length) - x.shape[1])).contiguous()


def _pipeline_of(
    model: ComposedModel,
    text: Transformer,
    parts: Mapping[int, Transformer],
    place: Place,
    objective: DialogObjective,
) -> Pipeline:
    everything, modules = stages(text.config, place.config), {}
    for i, part in parts.items():
        divide(part, part, place, embeds=i == 0)
        modules[i] = StageModule(ComposedPart(model, part, place, everything[i]), _run)
    handed = rows_handed(text, place)

    def of_last(part: ComposedPart, hidden: Tensor, batch: Batch) -> Outcome:
        return objective.of_answers(part, hidden, dataclasses.replace(batch, rows=own_positions(batch.rows, place)))

    def alike(batches: list[Batch]) -> list[Batch]:
        rows = even_rows([batch.rows for batch in batches])
        return [dataclasses.replace(batch, rows=own) for batch, own in zip(batches, rows, strict=True)]

    return Pipeline(place, modules, of_last, lambda batch: handed(batch.rows), alike)


def _run(part: ComposedPart, x: Tensor | None, batch: Batch) -> tuple[Tensor, Outcome | None]:
    rows = own_positions(batch.rows, part.place)
    wanted = {name: inputs for name, inputs in batch.inputs.items() if x is None or part.interleaved(name)}
    return part.hidden_and_loss(rows.tokens, wanted, embeddings=x, documents=rows.documents)


def _divide_layers(model: ComposedModel, place: Place) -> None:
    """Leaves adapters the interleaved layers of this process's stages alone, and what is stored in shards of them."""
    everything = stages(model.text.config, place.config)
    own = {i for stage in everything[place.at.pipeline :: place.config.pipeline] for i in stage.layers}
    for adapter in model.adapters.values():
        layers = adapter.interleaved()
        kept = {i: layer for i, layer in layers.items() if i in own}
        dropped = {layer for i, layer in layers.items() if i not in own}
        for parent in list(adapter.modules()):
            parent._modules = {name: child for name, child in parent._modules.items() if child not in dropped}
        for layer in kept.values():
            shard_block(layer, place, place.config.reshard, methods=["keys_values"])
        adapter.interleaved = lambda kept=kept: kept  # type: ignore[method-assign]
