"""Cross-entropy over a large vocabulary without its logits.

At a vocabulary of 128,256 the logits of a batch, their logarithms and their gradient outweigh the whole model. Here a
chunk of positions is projected at a time, and what its loss sends back is added up at once: no projection is made
twice, and none outlives its chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .linear import product

CHUNK_BYTES = 1 << 28
"""Memory of the float32 logits of one chunk. Each chunk reads the weight twice and its gradient once: fewer than about
a hundred positions would be bound by that."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """`cross_entropy(hidden @ weight.T, targets, reduction="sum")`, with gradients, in the memory of a chunk.

    Logits are made in the precision of autocast where it is on, or of `hidden`; the loss is float32 (float64 for
    float64), and so is the sum of the weight's gradient over chunks. The gradients are made in the forward pass,
    so only one backward pass can use them, and they cannot be differentiated again.

    Args:
        hidden: (N, D).
        weight: (V, D), the output projection.
        targets: (N,) int64, class ids.
        chunk_bytes: memory of the logits of one chunk, which holds at least one position.

    Returns: the summed loss, and how many targets have the highest logit, int64.
    """
    loss, right = _LinearCrossEntropy.apply(hidden, weight, targets, chunk_bytes)  # type: ignore[misc]
    return loss, right


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """The cross-entropy of each target, (N,) float32; arguments as for `linear_cross_entropy`. Without gradients."""
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    losses = [F.cross_entropy((chunk @ weight.T).float(), target, reduction="none") for chunk, target in chunks]
    return torch.cat(losses) if losses else hidden.new_zeros(0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int):
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
            for start in range(0, len(targets), rows):
                chunk, target = low_hidden[start : start + rows], targets[start : start + rows, None]
                log_p = torch.log_softmax(product(chunk, low_weight), dim=-1, dtype=wide)
                of_target = log_p.gather(1, target)
                loss -= of_target.sum()
                right += (log_p.amax(1, keepdim=True) <= of_target).sum()
                if not (to_hidden or to_weight):
                    continue
                of_logits = log_p.exp_().scatter_add_(1, target, torch.full_like(of_target, -1)).to(low)
                if of_hidden is not None:
                    of_hidden[start : start + rows] = product(of_logits, low_weight.T)
                if of_weight is not None:
                    if low == of_weight.dtype:
                        of_weight.addmm_(of_logits.T, chunk)
                    else:
                        of_weight += of_logits.T @ chunk
        ctx.gradients = of_hidden, of_weight
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once; call it again")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        for gradient in (of_hidden, of_weight):
            if gradient is not None:
                gradient.mul_(gradients[0])
        return of_hidden, of_weight, None, None
