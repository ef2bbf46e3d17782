"""Silent data corruption (section 3.3.4 of the paper): whether replicas of the same tensors are equal to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHUNK = 2**20  # elements: their places and products stay in the cache of a CPU
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHOWN = 8  # ranks in a message
GOLDEN = -7046029254386353131  # 2**64 over the golden ratio, as int64


class ReplicaError(RuntimeError):
    """Replicas of the same weights differ: something computed or stored wrong bits."""


def require_equal(
    tensors: Mapping[str, Tensor], where: str, last_good: Path | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Compares hashes of tensors over the processes that hold replicas of them. All of them call it.

    Args:
        tensors: what every process of the group should hold alike, with the same names in the same order; of sharded
            tensors their local parts.
        where: begins the message.
        last_good: the newest checkpoint that was found equal, for the message.
        group: the processes that hold replicas; None: all.

    Raises:
        ReplicaError: on every process of the group; names the tensors, and the ranks that differ from most others.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1 or not tensors:
        return
    hashes = torch.stack([bit_hash(tensor) for tensor in tensors.values()])
    # ~x falls as x rises, so that one maximum gives both ends, in a traffic that does not grow with the group.
    ends = torch.cat([hashes, ~hashes])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = ends[: len(hashes)], ~ends[len(hashes) :]
    differing = (highest != lowest).nonzero()[:, 0].tolist()
    if not differing:
        return
    found = [torch.empty_like(hashes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, hashes, group=group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    names = list(tensors)
    shown = ", ".join(names[i] for i in differing[:4])
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise ReplicaError(
        f"{where}: replicas differ in {shown}{more}: {_verdict(torch.stack(found)[:, differing], ranks)}; stopped. "
        f"Last good checkpoint: {last_good or 'none yet'}; the same command goes on from there"
    )


def replicated_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters of a model, frozen ones too, and the optimizer's moments, by name. Buffers may count what a
    process has seen, and are left out."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def bit_hash(tensor: Tensor) -> Tensor:
    """A hash of the bits of a tensor of any dtype: () int64 on the device of the tensor, or on the GPU beside it.

    The bits of each element, as an integer, times an odd number that depends on its place, summed modulo 2**64: one
    flipped bit always changes it.
    """
    flat = tensor.detach().reshape(-1)
    flat = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, len(flat), CHUNK):
        chunk = flat[first : first + CHUNK].long()
        places = torch.arange(first, first + len(chunk), device=flat.device)
        total += (chunk * (places * GOLDEN | 1)).sum()
    return total


def _verdict(hashes: Tensor, ranks: list[int]) -> str:
    """Names the ranks that do not hold what most hold.

    Args:
        hashes: (processes, tensors) of the tensors that differ.
        ranks: of the processes.
    """
    contents = [tuple(row) for row in hashes.tolist()]
    (most, holders), *others = Counter(contents).most_common()
    if any(count == holders for _, count in others):
        return f"of ranks {', '.join(map(str, ranks[:SHOWN]))} none is in the majority"
    wrong = [rank for rank, content in zip(ranks, contents, strict=True) if content != most]
    shown = ", ".join(map(str, wrong[:SHOWN]))
    return f"{'ranks' if wrong[1:] else 'rank'} {shown} ({len(wrong)} of {len(ranks)}) not as the others"
