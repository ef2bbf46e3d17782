"""Processes: one by default, several where `torchrun` started them. Data parallel: every process holds the
whole model and its share of the samples; gradients are summed in float32 or better."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .failure import failures_told
from .rendezvous import store_of_this_start

T = TypeVar("T")

BUCKET_ELEMENTS = 2**24  # 64 MiB in float32: large enough for bandwidth, small beside the gradients


def device() -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Joins the processes that `torchrun` started (gloo on CPU, nccl on GPUs) and leaves them at the end.

    Without torchrun's environment variables it does nothing: one process. Nor where a group exists already.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    orderly = True
    try:
        with failures_told():
            if (store := store_of_this_start(timeout)) is None:
                dist.init_process_group(backend, timeout=timeout)
            else:
                own, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=timeout)
            yield
    except Exception:
        orderly = False
        raise
    finally:
        # NCCL would wait for collectives that the others may never join: the end of the process does without.
        if dist.is_initialized() and (orderly or not torch.cuda.is_available()):
            dist.destroy_process_group()


def require_process_group() -> None:
    """Raises:
    RuntimeError: torchrun started several processes, but they were never joined; each would train alone and
        write over the others.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"{started} processes were started, but not joined: run inside `with parallel.process_group():`"
        )


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The (picklable) values of all processes of a group (None: of all there are), by rank, on each of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_first(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs a function on the first process of a group (None: of all there are) and hands its (picklable) result to all
    of them; if it raises, all raise, so that none waits for ever."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised again below, on every process
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_each(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Runs a function on every process of a group (None: of all there are) and hands the (picklable) results to all of
    them, by rank; if it raises anywhere, all raise."""
    result, failure = None, None
    try:
        result = function()
    except Exception as error:  # raised again below, on every process
        failure = error
    outcomes = gather((result, failure), group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [found for found, _ in outcomes]  # type: ignore[misc]


def broadcast(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Makes the tensors equal to those of the first process of a group (None: of all), in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=group, group_src=0)


def sum_all(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sums gradients over processes in place, in float32 or the parameter's own better precision.

    Processes may have touched different parameters (a batch without an image leaves the image adapter alone):
    a first sum says which parameters anybody touched, and all processes then run the same collectives over
    those. A parameter that nobody touched keeps grad None.

    Args:
        parameters: the same on every process of the group, in the same order.
        group: processes with replicas of the same parameters; None: all.
    """
    if not parameters or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    touched = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(touched, group=group)
    parameters = [p for p, count in zip(parameters, touched.tolist(), strict=True) if count]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([local(p.grad) for p in parameters if p.grad is not None]):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([g.reshape(-1).to(dtype) for g in bucket])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([g.numel() for g in bucket])
        for piece, gradient in zip(pieces, bucket, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that processes share; they all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, cut at about BUCKET_ELEMENTS."""
    bucket: list[Tensor] = []
    elements = 0
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or elements + gradient.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    if bucket:
        yield bucket
