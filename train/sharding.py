"""Weights, gradients and optimizer state in shards over processes: FSDP, with replicas of the shards HSDP (section
3.3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from .place import Place


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    place: Place,
    *,
    kept: Iterable[nn.Module] = (),
    methods: Sequence[str] = (),
) -> None:
    """Each process keeps a part of every weight; what the layout stores whole stays as it is.

    Args:
        model: afterwards its parameters are `DTensor`s. Their gradients are sums over the processes, not means.
        blocks: modules of it whose weights are gathered together when they run. What is in none of them is gathered
            when the model runs, and stays until the end of the backward pass.
        kept: further blocks, which stay until then as well.
        methods: of the model, which may be called in place of `forward`; none of them may call another.
    """
    for block in blocks:
        shard_block(block, place, place.config.reshard)
    for block in kept:
        shard_block(block, place, False)
    shard_block(model, place, False, methods)


def shard_block(block: nn.Module, place: Place, reshard: bool, methods: Sequence[str] = ()) -> None:
    """`shard` for one module, whose weights are gathered together.

    Args:
        reshard: whether they are dropped after it has run.
        methods: of the module, which may be called beside `forward`.
    """
    if place.storage is None:
        return
    # Sums of gradients are float32 either way.
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = low if place.config.gather == "bfloat16" else MixedPrecisionPolicy()
    sharded: FSDPModule = fully_shard(block, mesh=place.storage, reshard_after_forward=reshard, mp_policy=policy)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_gradient_divide_factor(1.0)
    for method in methods:
        register_fsdp_forward_method(block, method)


def borrow_weight(module: nn.Module) -> Tensor:
    """The whole weight of a module, for another that uses it on inputs of this process; its gradient is the sum over
    processes. All of those call it that share the weight and have not gathered it by running the module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(weight, DTensor):
        return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    # The memory of what is gathered goes when the backward pass of another micro-batch ends.
    return weight.clone() if isinstance(module, FSDPModule) else weight


def give_back_gathered(model: nn.Module) -> None:
    """Drops weights that a forward pass gathered and no backward pass followed: until then the parameters of the model
    are others than those that train."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
