"""The dense Llama 3 transformer: architecture only (section 3.2 of "The Llama 3 Herd of Models",
arXiv 2407.21783).

Parameters carry Meta's names and layout (RoPE rotates adjacent pairs), so that released checkpoints load as
they are. Letters in shapes: B rows of a batch, T positions of a row, D model width, H query heads, G
key-value heads, Dh width of a head, V vocabulary, S slots of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Arrangement, BlockMask, attend, see_own_document
from .cache import Cache, Step
from .linear import Linear, linear
from .rms_norm import rms_norm

BeforeLayer = Callable[[int, Tensor], Tensor]


@dataclass(kw_only=True)
class RopeScaling:
    """Frequency scaling of the released 3.1 models (not in the paper): wavelengths above
    `original_max_seq_len / low_freq_factor` are stretched by `factor`, those below
    `original_max_seq_len / high_freq_factor` are kept, those between are blended."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self):
        if self.factor <= 0:
            raise ValueError(f"rope_scaling.factor must be positive, not {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling.low_freq_factor must be positive and below rope_scaling.high_freq_factor, not "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(kw_only=True)
class TransformerConfig:
    """Sizes of the language model (table 3 of the paper; `herdkit.text.presets` has the paper's).

    Args:
        dim: width D.
        n_layers: number of layers.
        n_heads: query heads H; `dim / n_heads` is the width of a head and must be even.
        n_kv_heads: key-value heads G, a divisor of `n_heads`.
        ffn_dim: inner width of the SwiGLU feed-forward.
        vocab_size: V, special tokens included.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or the long-context scaling of the released 3.1 models.
        norm_eps: epsilon of RMSNorm.
        max_seq_len: longest row, in tokens.
        tie_embeddings: the output projection is the embedding matrix (the released 1B and 3B).
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_seq_len: int = 8192
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim ({self.dim}) must be an even multiple of n_heads ({self.n_heads})")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads})")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class Shared(NamedTuple):
    """What all layers of one forward pass share: the rotation (see `rotary_turns`), what positions see (see `attend`),
    and the cache with what it planned, or None."""

    turns: Tensor
    sees: Tensor | Arrangement | BlockMask | None = None
    cache: Cache | None = None
    step: Step | None = None


def rotary_frequencies(config: TransformerConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of lanes, (Dh / 2,) float32; scaled where the config says so."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    turns = scaling.original_max_seq_len / (2 * math.pi / frequencies)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotary_turns(config: TransformerConfig, positions: Tensor) -> Tensor:
    """The turn of each pair of lanes as a complex number of modulus 1, (..., T, 1, Dh / 2) complex64, from
    positions (..., T).

    Computed from the config at every forward pass rather than kept as a buffer: a buffer would be lost by
    construction on the meta device and rounded by `model.to(torch.bfloat16)`.
    """
    angle = positions[..., None, None].float() * rotary_frequencies(config, positions.device)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates adjacent pairs of lanes of x (B, T, H, Dh), in float32 or wider; same dtype out."""
    # One complex product is three times faster on a CPU, backward included, than the same in real numbers.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, config.dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        heads = (-1, self.head_dim)
        q = rotate(self.wq(x).unflatten(-1, heads), shared.turns)
        k = rotate(self.wk(x).unflatten(-1, heads), shared.turns)
        v = self.wv(x).unflatten(-1, heads)
        if shared.cache is None or shared.step is None:
            return self.wo(attend(q, k, v, shared.sees).flatten(2))
        return self.wo(shared.cache.attend(self.layer, q, k, v, shared.step).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.w1 = Linear(dim, ffn_dim)
        self.w2 = Linear(ffn_dim, dim)
        self.w3 = Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        if not torch.is_grad_enabled():
            # Two large tensors less to allocate: a tenth of the time of a prompt on a CPU.
            return self.w2(F.silu(gate, inplace=True).mul_(self.w3(x)))
        return self.w2(F.silu(gate) * self.w3(x))


class TransformerLayer(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = x + self.attention(self.attention_norm(x), shared)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The language model. Weights are initialised as the constructor runs (see `init_weights`); built under
    `torch.device("meta")` it takes no memory and can be counted and planned at any size."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew; also what a model made with `to_empty` needs.

        The paper is silent: a linear weight is normal with standard deviation 1 / sqrt(inputs), cut at three
        deviations (0.0156 at width 4096), so that narrow models start alike; the projections that write to the
        residual stream are divided by sqrt(2 n_layers); norms are 1. The embedding is drawn with deviation 1, or,
        where it is tied to the output projection, as that.
        """
        for name, weight in self.named_parameters():
            if not weight.is_meta:  # nothing to draw, and at 405B it would take seconds
                init_weight(self.config, name, weight, generator)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, D)."""
        return self.tok_embeddings(tokens)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), the projection to the vocabulary; where embeddings are tied, the embedding matrix."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm to logits (..., V)."""
        if self.output is None:
            return linear(hidden, self.tok_embeddings.weight)
        return self.output(hidden)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        before_layer: BeforeLayer | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the next token at every position.

        Args:
            tokens: (B, T) int64; this or `embeddings`.
            embeddings: (B, T, D), in place of `embed(tokens)`.
            positions: (B, T) int64. Default: 0..T-1, restarting at every document. With a cache they name the
                slots, and every position sees the slots 0..itself; default (the prefill of an empty cache):
                0..T-1.
            documents: (B, T) int64, a document of a packed row is a run of one id; ids are distinct within a
                row. No position sees another document (section 3.2). Default: one document.
            cache: keys and values of earlier positions; this call's are added.
            before_layer: called as `hidden = before_layer(i, hidden)` just before layer i.

        Raises:
            ValueError: tokens and embeddings both or neither, a row longer than `max_seq_len` or than the
                cache, or documents together with a cache.
        """
        return self.unembed(
            self.hidden(
                tokens,
                embeddings=embeddings,
                positions=positions,
                documents=documents,
                cache=cache,
                before_layer=before_layer,
            )
        )

    def hidden(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        before_layer: BeforeLayer | None = None,
    ) -> Tensor:
        """What `forward` projects to the vocabulary: (B, T, D) after the final norm. Same arguments."""
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens or embeddings")
        x = self.tok_embeddings(tokens) if tokens is not None else embeddings
        assert x is not None
        shared = self.shared(x.shape[1], x.device, positions, documents, cache)
        for i, layer in enumerate(self.layers):
            if before_layer is not None:
                x = before_layer(i, x)
            x = layer(x, shared)
        return self.norm(x)

    def shared(
        self,
        length: int,
        device: torch.device,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: Cache | None,
    ) -> Shared:
        """What the layers share of a pass over rows of `length` positions; other arguments as in `forward`."""
        if self.config.max_seq_len < length:
            raise ValueError(f"a row of {length} tokens is longer than max_seq_len ({self.config.max_seq_len})")
        if cache is not None and documents is not None:
            raise ValueError("documents cannot be used with a cache: decode each document in its own row")
        steps = torch.arange(length, device=device)
        sees = None
        if documents is not None:
            sees = see_own_document(documents)
            if positions is None:
                positions = document_positions(documents)
        step = None if cache is None else cache.plan(positions, length)
        turns = rotary_turns(self.config, steps if positions is None else positions)
        return Shared(turns, sees, cache, step)

    def parameter_table(self) -> dict[str, int]:
        """Number of parameters by kind, and in all."""
        table: dict[str, int] = dict.fromkeys(("embeddings", "attention", "feed_forward", "norms", "output"), 0)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                kind = "norms"
            elif name.startswith("layers."):
                kind = name.split(".")[2]
            else:
                kind = "output" if name.startswith("output.") else "embeddings"
            table[kind] += weight.numel()
        return table | {"total": sum(table.values())}

    def flops_per_token(self, context: float) -> int:
        """Floating-point operations of the forward pass for one token that sees `context` positions (half the
        row under a causal mask); a training step takes three times as many. The embedding look-up is free."""
        config, table = self.config, self.parameter_table()
        multiplied = table["attention"] + table["feed_forward"] + config.vocab_size * config.dim
        return round(2 * multiplied + 4 * config.n_layers * config.dim * context)

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one position takes in a `KVCache` of this dtype."""
        config = self.config
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


@torch.no_grad()
def init_weight(config: TransformerConfig, name: str, weight: Tensor, generator: torch.Generator | None) -> None:
    """Draws one parameter, whole; see `Transformer.init_weights`."""
    if weight.dim() == 1:
        nn.init.ones_(weight)
        return
    std = weight.shape[1] ** -0.5
    if name == "tok_embeddings.weight" and not config.tie_embeddings:
        std = 1.0
    if name.endswith(("wo.weight", "w2.weight")):
        std /= math.sqrt(2 * config.n_layers)
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def document_positions(documents: Tensor) -> Tensor:
    """(B, T) document ids to positions (B, T) int64 that restart where the id changes."""
    steps = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    changed = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    return steps - torch.where(changed, steps, 0).cummax(dim=1).values
