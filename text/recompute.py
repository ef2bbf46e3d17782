"""Activation checkpointing: what the backward pass makes again rather than finds in memory (section 3.3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import linear
from .model import Shared, Transformer, TransformerLayer

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,  # of float8
    torch.ops.mkldnn._linear_pointwise.default,
    linear.COMPILED,
}
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def recompute(model: Transformer, what: Literal["none", "selective", "full"]) -> None:
    """Wraps every layer of a model; see `ParallelConfig.recompute`. Gradients stay what they were."""
    if what == "none":
        return
    run = _full if what == "full" else _selective
    for layer in model.layers:
        layer.forward = partial(run, layer)  # type: ignore[method-assign]


def _full(layer: TransformerLayer, x: Tensor, shared: Shared) -> Tensor:
    out: Any = checkpoint(lambda x: TransformerLayer.forward(layer, x, shared), x, use_reentrant=False)
    return out


def _selective(layer: TransformerLayer, x: Tensor, shared: Shared) -> Tensor:
    out: Any = checkpoint(
        lambda x: TransformerLayer.forward(layer, x, shared), x, use_reentrant=False, context_fn=_contexts
    )
    return out


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy())


def _policy() -> Callable[..., CheckpointPolicy]:
    products = {"forward": 0, "recompute": 0}

    def policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        if op in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in PRODUCTS:
            kind = "recompute" if context.is_recompute else "forward"
            products[kind] += 1
            if products[kind] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
