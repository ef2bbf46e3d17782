"""A linear layer on the faster of torch's two libraries of CPU kernels.

torch multiplies float32 matrices with MKL, which on the CPUs of other makers than its own is slower than oneDNN, the
library that torch has for bfloat16: on an AMD EPYC with AVX-512 by 1.2 to 1.5 times for the many rows of training and
prompts, and by 1.2 to 3 times for the few of decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ..train.precision import cpu_name

TRANSPOSED = range(16, 80)
"""Numbers of rows for which oneDNN is faster at the product of the weights with the transposed rows."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, (..., K) with (N, K) and (N,) to (..., N). In float32 on a CPU it may not be
    differentiable twice."""
    if not _on_onednn(x, weight):
        return F.linear(x, weight, bias)
    needing = (x, weight) if bias is None else (x, weight, bias)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needing)
    if torch.compiler.is_compiling():
        # Without gradients the compiler chooses the library itself, for weights that it may pack.
        return _compiled_linear(x, weight, bias) if differentiable else F.linear(x, weight, bias)
    if not differentiable:
        return product(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[return-value]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without gradients."""
    if not _on_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if rows not in TRANSPOSED:
        return _onednn(x, weight, bias)
    transposed = _onednn(weight, x.reshape(rows, -1))
    if bias is not None:
        transposed += bias[:, None]
    return transposed.t().contiguous().view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradients[0], product)


def _gradients(ctx: Any, gradient: Tensor, multiply: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad  # of a compiled graph two, where there is no bias
    of_x = multiply(gradient, weight.t()) if needed[0] else None
    of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2) if needed[1] else None
    of_bias = gradient.flatten(0, -2).sum(0) if any(needed[2:]) else None
    return (of_x, of_weight, of_bias)[: len(needed)]


@torch.library.custom_op("herdkit::linear", mutates_args=())
def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` as one operator, which a compiled graph calls as it is."""
    return product(x, weight, bias)


@_compiled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_compiled_linear.register_autograd(
    lambda ctx, gradient: _gradients(ctx, gradient, _compiled_linear),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


COMPILED = torch.ops.herdkit.linear.default
"""What a compiled graph calls."""


def _on_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and _onednn_is_faster()
    )


@torch.compiler.assume_constant_result  # torch.compile cannot trace how torch asks the CPU
def _onednn_is_faster() -> bool:
    return _libraries_of_an_amd()


@cache
def _libraries_of_an_amd() -> bool:
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and cpu_name().startswith("AMD")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch.compile calls for such a product; no public function of torch reaches it in float32. It takes the
    # numbers of a bias one after another, whatever its stride.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's `FlopCounterMode`, which knows its other products."""
    return 2 * math.prod(x_shape) * weight_shape[0]


if torch.backends.mkldnn.is_available():  # else there is no such operator
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


class Linear(nn.Linear):
    """`torch.nn.Linear`, without bias unless it is asked for."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
