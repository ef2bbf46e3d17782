"""The gated cross-attention layer that image and video adapters, or anyone's, insert before text layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..text.attention import dot_product_attention
from ..text.linear import Linear
from ..text.model import FeedForward, RMSNorm
from .contract import InterleavedLayer


class GatedCrossAttention(InterleavedLayer):
    """x + tanh(a) attention(norm x), then x + tanh(f) feed_forward(norm x); sections 7.2 of the paper and the
    released Llama 3.2 Vision code: grouped-query attention as in the language model, RMSNorm on queries and
    keys per head, no rotary positions, no biases, SwiGLU of the language model's width.

    Args:
        dim: width of the language model.
        n_heads: query heads; n_kv_heads: key and value heads.
        ffn_dim: hidden width of the feed-forward branch.
        memory_dim: width of the memory; the released model projects it to `dim` beforehand.
        norm_eps: epsilon of every RMSNorm.
        gate_init: value of both gates before tanh at the start. At 0, as released, the language model is
            undisturbed, but only the two gates receive a gradient in the first step.

    Parameters are named as in Meta's release (`gate_attn`, `gate_ffwd`, `attention.wq` and so on).
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        ffn_dim: int,
        memory_dim: int | None = None,
        norm_eps: float = 1e-5,
        gate_init: float = 0.0,
    ):
        super().__init__()
        if dim % n_heads or n_heads % n_kv_heads:
            raise ValueError(f"dim {dim}, n_heads {n_heads} and n_kv_heads {n_kv_heads} must divide evenly")
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = CrossAttention(dim, n_heads, n_kv_heads, memory_dim or dim, norm_eps)
        self.gate_attn = nn.Parameter(torch.full((1,), gate_init))
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = FeedForward(dim, ffn_dim)
        self.gate_ffwd = nn.Parameter(torch.full((1,), gate_init))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.keys_values(memory)

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), keys, values, mask)
        hidden = hidden + self.gate_attn.tanh() * attended
        return hidden + self.gate_ffwd.tanh() * self.feed_forward(self.ffn_norm(hidden))


class CrossAttention(nn.Module):
    """Queries from the text, keys and values from the memory; arguments as in `GatedCrossAttention`."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, memory_dim: int, norm_eps: float):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = Linear(dim, dim)
        self.wk = Linear(memory_dim, n_kv_heads * self.head_dim)
        self.wv = Linear(memory_dim, n_kv_heads * self.head_dim)
        self.wo = Linear(dim, dim)
        self.q_norm = RMSNorm(self.head_dim, norm_eps)
        self.k_norm = RMSNorm(self.head_dim, norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """By Glorot's rule, and `match_queries_to_keys` where both sides have one width. The paper is silent."""
        for linear in (self.wq, self.wk, self.wv, self.wo):
            nn.init.xavier_uniform_(linear.weight)
        if self.wq.in_features == self.wk.in_features:
            match_queries_to_keys(self.wq.weight, self.wk.weight, self.head_dim)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        N, M, _ = memory.shape
        keys = self.wk(memory).view(N, M, self.n_kv_heads, self.head_dim)
        values = self.wv(memory).view(N, M, self.n_kv_heads, self.head_dim)
        return self.k_norm(keys).transpose(1, 2), values.transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        B, T, _ = x.shape
        queries = self.q_norm(self.wq(x).view(B, T, self.n_heads, self.head_dim)).transpose(1, 2)
        out = dot_product_attention(
            queries, keys.to(queries.dtype), values.to(queries.dtype), attn_mask=mask, enable_gqa=True
        )
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))


@torch.no_grad()
def match_queries_to_keys(query: Tensor, key: Tensor, head_dim: int) -> None:
    """Sets both projections, (H * Dh, D) and (G * Dh, D), to one and the same orthogonal one for each group of heads,
    so that what asks attends at first to what is like it (mimetic initialisation, arXiv 2305.09828). What to look up
    is then learned several times sooner than from independent draws."""
    # Drawn in float32: there is no QR decomposition in bfloat16.
    key.copy_(nn.init.orthogonal_(torch.empty_like(key, dtype=torch.float32)))
    shared = key.view(-1, 1, head_dim, key.shape[1])
    group = query.shape[0] // key.shape[0]
    query.copy_(shared.expand(-1, group, -1, -1).reshape_as(query))


@torch.no_grad()
def pass_unchanged(first: Tensor, second: Tensor) -> None:
    """Sets two projections, (M, D) and (D, M), to an orthogonal one and its transpose: what goes through both of them
    comes out as it was, or, where M < D, its part in M dimensions."""
    first.copy_(nn.init.orthogonal_(torch.empty_like(first, dtype=torch.float32)))
    second.copy_(first.T)
