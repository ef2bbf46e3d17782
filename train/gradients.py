"""What becomes of gradients between the backward pass and the optimizer, on any layout: sums over replicas, the norm
over all shards, clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import parallel
from .parallel import local
from .place import Place
from .stage_copies import StageCopies


def summed_gradients(parameters: Sequence[tuple[str, Tensor]], place: Place, copies: StageCopies) -> dict[str, Tensor]:
    """This process's part of every gradient, by name, summed over the batch of all processes; in the memory of
    `parameter.grad`. Parameters that nobody touched are left out. All processes call it."""
    for _, p in parameters:
        if isinstance(p.grad, DTensor) and isinstance(p, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    divided, stored, whole = [], [], []
    for _, p in parameters:
        names = p.device_mesh.mesh_dim_names or () if isinstance(p, DTensor) else None
        (whole if names is None else divided if "tensor" in names else stored).append(p)
    if place.storage is None:  # else the backward pass has summed what is stored in shards
        parallel.sum_gradients(divided, place.group("data"))
    parallel.sum_gradients(stored, place.group("tensor"))
    parallel.sum_gradients(whole, place.group("positions"))
    copies.sum_gradients(parameters)
    return {name: local(p.grad) for name, p in parameters if p.grad is not None}


def gradient_norm(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], place: Place, copies: StageCopies
) -> Tensor:
    """The norm of the whole gradient, from this process's part of it. All processes call it.

    Args:
        parameters: by name. gradients: as `summed_gradients` gives them.

    Returns: () float32, or float64 where there are gradients of that.
    """
    if place.replicas_alone:
        return nn.utils.get_total_norm(list(gradients.values()), foreach=True)
    names = list(gradients)
    norms: Sequence[Tensor] = ()
    if names:  # else no micro-batch had an input of what trains
        norms = torch._foreach_norm([gradients[name] for name in names])  # pyright: ignore[reportPrivateImportUsage]
    square = torch.zeros((), dtype=torch.float64, device=parallel.device())
    for name, norm in zip(names, norms, strict=True):
        square += norm.double().square() / _holders(parameters[name], place, copies.number(name))
    found = parallel.sum_all(square).sqrt()
    return found.to(norms[0].dtype if norms else torch.float32)


def _holders(parameter: Tensor, place: Place, stages: int) -> float:
    """How many processes have the same part of a parameter that so many processes of the pipeline have."""
    parts = place.layout.pipeline / stages
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        parts *= math.prod(mesh.size(i) for i, where in enumerate(parameter.placements) if not where.is_replicate())
    return place.layout.processes / parts


def clip(gradients: Mapping[str, Tensor], norm: Tensor, most: float) -> None:
    """Scales gradients in place so that their norm, which is given, is at most `most`."""
    if not gradients:
        return
    scale = torch.clamp(most / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(list(gradients.values()), scale)  # pyright: ignore[reportPrivateImportUsage]
