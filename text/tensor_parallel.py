"""Tensor parallelism with its sequence and loss parallelism (section 3.3.2): every matrix of a layer is divided between
processes, and so are the positions of what stands between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from .model import RMSNorm, Shared, Transformer

POSITIONS = Shard(1)


def share_tensors(model: Transformer, mesh: DeviceMesh) -> None:
    """Divides the weights of a model, or of a stage of a pipeline, between the processes of a mesh of one dimension.

    `model.hidden` takes the tokens of whole rows on every process, or the embeddings (B, T / tensor, D) of this
    process's positions; it gives whole rows, or, in a stage of a pipeline but the last, its own positions. The
    gradients of what follows the last norm are summed over the processes: each must have sent back its own part alone,
    as the loss with `output_weight`, which is divided by rows, does.
    """
    plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(POSITIONS, None),
            desired_input_layouts=(Replicate(), None),  # type: ignore[arg-type]
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=POSITIONS),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(POSITIONS,), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=POSITIONS),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    if isinstance(model.tok_embeddings, nn.Embedding):
        embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=POSITIONS)
        parallelize_module(model.tok_embeddings, mesh, embedding)
    shared = model.shared

    def shared_by_rows(length: int, *others: Any) -> Shared:
        return shared(length * mesh.size(), *others)

    model.shared = shared_by_rows  # type: ignore[method-assign]
    if isinstance(model.norm, RMSNorm):
        _end_with_whole_rows(model, mesh)


def _end_with_whole_rows(model: Transformer, mesh: DeviceMesh) -> None:
    parallelize_module(model.norm, mesh, SequenceParallel(use_local_output=False))
    model.norm.register_forward_hook(_whole_rows)
    if model.output is not None:
        parallelize_module(model.output, mesh, ColwiseParallel())

    def unembed(hidden: Tensor) -> Tensor:
        weight: Any = model.output_weight
        return DTensor.from_local(F.linear(hidden, weight.to_local()), mesh, [Shard(hidden.dim() - 1)]).full_tensor()

    model.unembed = unembed  # type: ignore[method-assign]


def _whole_rows(_module: Any, _arguments: Any, hidden: Any) -> Tensor:
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
