"""Bridges from an encoder's width to the language model's, for soft-token adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..text.linear import Linear
from ..text.model import RMSNorm


class Projector(nn.Module):
    """Stacks `stack` neighbouring tokens and maps them to the language model's embedding space with a
    two-layer GELU network and a norm whose gain starts at the scale of token embeddings.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: width of the language model.
        stack: neighbouring tokens that become one soft token.
        output_scale: root mean square of the soft tokens at the start; the standard deviation of the language
            model's token embeddings is a good value, or else soft tokens drown the text or are drowned.
    """

    def __init__(self, in_dim: int, out_dim: int, stack: int = 1, output_scale: float = 0.02):
        super().__init__()
        self.stack = stack
        self.hidden = Linear(in_dim * stack, out_dim, bias=True)
        self.output = Linear(out_dim, out_dim, bias=True)
        self.norm = RMSNorm(out_dim, 1e-5)
        nn.init.constant_(self.norm.weight, output_scale)

    def length(self, tokens: int) -> int:
        """Soft tokens for this many encoder tokens; an incomplete last stack is padded with zeros."""
        return -(-tokens // self.stack)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, in_dim) to (N, ceil(L / stack), out_dim)."""
        N, L, width = tokens.shape
        tokens = F.pad(tokens, (0, 0, 0, -L % self.stack)).reshape(N, -1, width * self.stack)
        return self.norm(self.output(F.gelu(self.hidden(tokens))))


def embedding_scale(weight: Tensor) -> float:
    """Root mean square of a table of token embeddings (V, D), for `Projector.output_scale`."""
    return float(torch.linalg.vector_norm(weight.detach().float()) / weight.numel() ** 0.5)
