"""Weights of 8 bits for decoding: a quarter of the memory of float32 and, where reading the weights is what takes the
time, up to a quarter of it. Needs the extra `quantisation` (torchao)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear
from .model import Transformer

FEW_ROWS = 32
"""As decoding has them."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale for each output.

    Args:
        weight: (N, K) int8. scale: (N,) float; the weights are `weight * scale[:, None]`.
    """

    weight: Tensor
    scale: Tensor
    short_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # For the kernel below; converted once, since a compiled graph cannot do it on the way.
        self.register_buffer("short_scale", scale.bfloat16(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows <= FEW_ROWS and x.device.type == "cpu" and not torch.is_grad_enabled():
            # The only kernel that reads int8 weights as they are takes bfloat16, with float32 sums.
            short = x.reshape(rows, -1).bfloat16()
            out = torch.ops.aten._weight_int8pack_mm.default(short, self.weight, self.short_scale)
            return out.to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def quantise(model: Transformer) -> Transformer:
    """Rounds all matrices but the embedding to int8, each row by its own largest value; for decoding, not for training.
    Rounding is by at most half a scale, that is 1/254 of the row's largest weight.

    Args:
        model: changed in place, and returned. An output projection tied to the embedding becomes one of its own.

    Raises:
        ModuleNotFoundError: torchao is not installed; names the extra.
    """
    _torchao()
    if model.output is None:
        model.output = Linear(model.config.dim, model.config.vocab_size)
        model.output.weight = nn.Parameter(model.tok_embeddings.weight.detach().clone())
    round_matrices(model)
    return model


def round_matrices(module: nn.Module) -> None:
    """Rounds the matrices of a module as `quantise` does, in place: of those in it that are
    `herdkit.text.linear.Linear`, all without a bias.

    Raises:
        ModuleNotFoundError: as `quantise`.
    """
    torchao = _torchao()
    module.requires_grad_(False)
    config = torchao.Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    torchao.quantize_(module, config, filter_fn=lambda part, _: isinstance(part, Linear) and part.bias is None)
    for name, part in list(module.named_modules()):
        if isinstance(part, Linear) and part.bias is None:
            rounded: Any = part.weight
            module.set_submodule(name, Int8Linear(rounded.qdata, rounded.scale[:, 0]))


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('int8 weights need torchao: pip install "herdkit[quantisation]"') from error
    return torchao.quantization
