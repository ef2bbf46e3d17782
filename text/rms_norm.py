"""RMSNorm that is fast on CPUs too. What torch fuses on a GPU it computes on a CPU in a dozen passes over memory, most
of them in the backward pass: a third of the time of training a small language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension of x (..., D), with weight (D,). In float32 and float64 on
    a CPU it cannot be differentiated twice."""
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    dense = not isinstance(x, DTensor)
    if not (eager and dense) or x.dtype not in (torch.float32, torch.float64) or x.dtype != weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    if not torch.is_grad_enabled():
        return (x * _scale(x, eps)).mul_(weight)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


def _scale(x: Tensor, eps: float) -> Tensor:
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        # That of LayerNorm around a mean of 0, without what LayerNorm subtracts because the mean depends on x.
        wanted = [True, ctx.needs_input_grad[1], False]
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, weight.shape, torch.zeros_like(scale), scale, weight, None, wanted
        )
        of_x += (gradient @ weight)[..., None] * scale / x.shape[-1]
        return of_x, of_weight, None
