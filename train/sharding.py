"""Weights, gradients and optimizer state in shards over processes: FSDP, with replicas of the shards HSDP (section
3.3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from .place import Place


def shard(model: nn.Module, blocks: Iterable[nn.Module], place: Place, methods: Sequence[str] = ()) -> None:
    """Each process keeps a part of every weight; what the layout stores whole stays as it is.

    Args:
        model: afterwards its parameters are `DTensor`s. Their gradients are sums over the processes, not means.
        blocks: modules of it whose weights are gathered together when they run. What is in none of them is gathered
            when the model runs, and stays until the end of the backward pass.
        methods: of the model, which may be called in place of `forward`.
    """
    mesh = place.storage
    if mesh is None:
        return
    for module, reshard in (*((block, place.config.reshard) for block in blocks), (model, False)):
        sharded: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)
    for method in methods:
        register_fsdp_forward_method(model, method)
