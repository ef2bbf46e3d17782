"""A compiled decoding step: fixed shapes, a static cache, one compilation for each batch size and cache length."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import KVCache
from .generate import Forward
from .model import Transformer


def compile_step(model: Transformer, backend: str = "inductor") -> Forward:
    """For `generate(..., step=...)`: `model.hidden` on one token a row, compiled when first used (20-60 s) and kept for
    as long as the function is, so make one and use it for all requests. The batch size should not change."""

    def step(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return model.hidden(tokens, positions=positions, cache=cache)

    return torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
