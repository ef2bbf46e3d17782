"""A compiled decoding step: fixed shapes, a static cache, one compilation for each batch size and cache length."""

from __future__ import annotations

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
