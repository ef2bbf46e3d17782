"""Compiled passes. Of decoding, the step: fixed shapes, a static cache, one compilation for each batch size and cache
length. Of training, the layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from .cache import KVCache
from .generate import Forward
from .model import Transformer


def compile_step(model: Transformer, *, freeze: bool = False, backend: str = "inductor") -> Forward:
    """For `generate(..., step=...)`: `model.hidden` on one token a row, compiled when first used (20 to 60 s) and kept
    for as long as the function is, so make one and use it for all requests. Another batch size compiles anew.

    Args:
        freeze: pack the weights for the kernels of a CPU, which makes batches faster. It takes their memory once more,
            and later changes of the weights are not seen.
        backend: of `torch.compile`.
    """

    def step(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return model.hidden(tokens, positions=positions, cache=cache)

    options = {"freezing": True} if freeze else None
    return torch.compile(step, fullgraph=True, dynamic=False, backend=backend, options=options)  # type: ignore[arg-type]


def compile_layers(model: Transformer, backend: str) -> None:
    """Compiles what the layers of a model do, with what they make again in the backward pass (`recompute`) and with
    what they do together with other processes (`share_tensors`): once for all that are alike, when the first one runs.
    To be called after those, and before `fully_shard`, whose work stays outside.

    Args:
        backend: of `torch.compile`; "aot_eager" does the same without a compiler, for tests.
    """

    @cache
    def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(run, backend=backend)

    for layer in model.layers:
        run = layer.forward.func if isinstance(layer.forward, partial) else type(layer).forward
        layer.forward = partial(compiled(run), layer)  # type: ignore[method-assign]
