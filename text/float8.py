"""Matrix products in 8 bits for training, through torchao (the extra `quantisation`). What is stored, gathered and
summed keeps its precision; the operands of a product and of its two gradients are scaled and rounded as they come."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import nn

from ..train.layout import LayoutError
from .model import Transformer, TransformerLayer

UNIT = 16
"""Of what the hardware wants both sides of a matrix to be a multiple."""

ADA = (8, 9)
"""The least compute capability of a GPU that multiplies float8."""


def convert_to_float8(
    model: Transformer, scales: Literal["tensorwise", "rowwise", "emulated"], device: torch.device
) -> None:
    """Changes the matrices of all layers but the model's first and last, in place; their weights stay as they are. See
    `ParallelConfig.float8`.

    Args:
        model: whole, or a stage of a pipeline.
        device: that it will train on.

    Raises:
        LayoutError: the device does not multiply float8, or a matrix is no multiple of what it takes.
        ModuleNotFoundError: torchao is not installed; names the extra.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('float8 training needs torchao: pip install "herdkit[quantisation]"') from error
    if scales != "emulated":
        require_float8(device)
    recipe = Float8LinearConfig.from_recipe_name("rowwise" if scales == "rowwise" else "tensorwise")
    recipe = dataclasses.replace(recipe, emulate=scales == "emulated")
    ends = (0, model.config.n_layers - 1)

    def fits(module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Linear) and (module.in_features % UNIT or module.out_features % UNIT):
            shape = f"{module.out_features} x {module.in_features}"
            raise LayoutError("float8", f"{name} is {shape}, and both must be multiples of {UNIT}")
        return True

    for layer in model.layers:
        assert isinstance(layer, TransformerLayer)
        if layer.attention.layer not in ends:
            convert_to_float8_training(layer, module_filter_fn=fits, config=recipe)


def require_float8(device: torch.device) -> None:
    """
    Raises:
        LayoutError: the device does not multiply float8.
    """
    if device.type != "cuda":
        raise LayoutError("float8", f"{device.type} does not multiply float8; 'emulated' does the same, slowly")
    if torch.cuda.get_device_capability(device) < ADA:
        raise LayoutError("float8", f"{torch.cuda.get_device_name(device)} does not multiply float8; leave it out")
