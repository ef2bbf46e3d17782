"""Cross-entropy over a large vocabulary without its logits.

At a vocabulary of 128,256 the logits of a batch, their logarithms and their gradient outweigh the whole model. Here a
chunk of positions is projected at a time, and what its loss sends back is added up at once: no projection is made
twice, and none outlives its chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from .linear import product

CHUNK_BYTES = 1 << 28
"""Memory of the float32 logits of one chunk. Each chunk reads the weight twice and its gradient once: fewer than about
a hundred positions would be bound by that."""

BLOCK_BYTES = 1 << 22
"""Memory of the float32 logits that are turned into probabilities at a time on a CPU, within its caches."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """`cross_entropy(hidden @ weight.T, targets, reduction="sum")`, with gradients, in the memory of a chunk.

    Logits are made in the precision of autocast where it is on, or of `hidden`; the loss is float32 (float64 for
    float64), and so is the sum of the weight's gradient over chunks. The gradients are made in the forward pass,
    so only one backward pass can use them, and they cannot be differentiated again.

    Args:
        hidden: (N, D).
        weight: (V, D), the output projection. Of a `DTensor` whose rows are divided between processes, each makes the
            logits of its own rows; all get the same loss, and of the gradient of `hidden` each its own part, whose sum
            it is (loss parallel, section 3.3.2).
        targets: (N,) int64, class ids.
        chunk_bytes: memory of the logits of one chunk, which holds at least one position.

    Returns: the summed loss, and how many targets have the highest logit, int64.
    """
    weight, part = _own_rows(weight)
    loss, right = _LinearCrossEntropy.apply(hidden, weight, targets, chunk_bytes, part)  # type: ignore[misc]
    return loss, right


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """The cross-entropy of each target, (N,) float32; arguments as for `linear_cross_entropy`. Without gradients."""
    weight, part = _own_rows(weight)
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    losses = [
        -_log_softmax(product(chunk, weight), target[:, None], torch.float32, part).of_target[:, 0]
        for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0)


class _Part(NamedTuple):
    """Which rows of the vocabulary this process has: from `first` on, of those that the group shares."""

    first: int
    group: dist.ProcessGroup


def _own_rows(weight: Tensor) -> tuple[Tensor, _Part | None]:
    if not isinstance(weight, DTensor):
        return weight, None
    mesh = weight.device_mesh
    assert tuple(weight.placements) == (Shard(0),)
    assert weight.shape[0] % mesh.size() == 0
    own = weight.to_local()
    return own, _Part(mesh.get_local_rank() * own.shape[0], mesh.get_group())


class _LogSoftmax(NamedTuple):
    """
    Args:
        log_p: (N, V), or of this process's rows of the vocabulary. of_target, highest: (N, 1).
        target: (N, 1) int64, where the target stands in `log_p`. there: (N, 1), 1 where it stands there at all, else 0.
    """

    log_p: Tensor
    of_target: Tensor
    highest: Tensor
    target: Tensor
    there: Tensor


def _log_softmax(logits: Tensor, target: Tensor, dtype: torch.dtype, part: _Part | None) -> _LogSoftmax:
    """
    Args:
        logits: (N, V), or of this process's rows of the vocabulary; their memory may be used.
    """
    if part is None:
        log_p = torch.log_softmax(logits, dim=-1, dtype=dtype)
        of_target = log_p.gather(1, target)
        return _LogSoftmax(log_p, of_target, log_p.amax(1, keepdim=True), target, torch.ones_like(of_target))
    # In place: the logits are the largest tensors there are.
    logits = logits.to(dtype)
    highest = logits.amax(1, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX, part.group)
    logits.sub_(highest)
    own = target - part.first
    there = (own >= 0) & (own < logits.shape[1])
    own = torch.where(there, own, 0)
    sums = torch.cat([logits.exp().sum(1, keepdim=True), logits.gather(1, own) * there], dim=1)
    dist.all_reduce(sums, group=part.group)
    log_sum, of_target = sums[:, :1].log(), sums[:, 1:]
    return _LogSoftmax(logits.sub_(log_sum), of_target - log_sum, -log_sum, own, there.to(dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int, part: _Part | None
    ) -> tuple[Tensor, Tensor]:
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        device = hidden.device.type
        # Autocast keeps no copy of a weight inside a Function: every chunk would cast it anew.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            low_hidden, low_weight = hidden.detach().to(low), weight.detach().to(low)
            of_hidden = torch.empty_like(hidden) if to_hidden else None
            of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide)) if to_weight else None
            loss, right = hidden.new_zeros((), dtype=wide), targets.new_zeros(())
            rows = max(1, chunk_bytes // (4 * weight.shape[0]))
            block = rows if part is not None or device != "cpu" else max(1, BLOCK_BYTES // (4 * weight.shape[0]))
            for start in range(0, len(targets), rows):
                chunk, target = low_hidden[start : start + rows], targets[start : start + rows, None]
                logits = product(chunk, low_weight)
                for own, own_target in zip(logits.split(block), target.split(block), strict=True):
                    found = _log_softmax(own, own_target, wide, part)
                    loss -= found.of_target.sum()
                    right += (found.highest <= found.of_target).sum()
                    if to_hidden or to_weight:
                        own.copy_(found.log_p.exp_().scatter_add_(1, found.target, -found.there))
                # From here on these are their gradient.
                if of_hidden is not None:
                    of_hidden[start : start + rows] = product(logits, low_weight.T)
                if of_weight is not None:
                    if low == of_weight.dtype:
                        of_weight.addmm_(logits.T, chunk)
                    else:
                        of_weight += logits.T @ chunk
        ctx.gradients = of_hidden, of_weight
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once; call it again")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        for gradient in (of_hidden, of_weight):
            if gradient is not None:
                gradient.mul_(gradients[0])
        return of_hidden, of_weight, None, None, None
