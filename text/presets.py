"""Sizes of the paper's models (table 3, section 3.2 of "The Llama 3 Herd of Models", arXiv 2407.21783), of the
later small releases, of a ladder for scaling laws and of a tiny one.

The paper gives a vocabulary of 128,000; the released tokenizer adds 256 special tokens. RoPE scaling is in
the released 3.1 models, not in the paper.
"""

from __future__ import annotations

from .model import RopeScaling, TransformerConfig

VOCAB_SIZE = 128_256

# dim, layers, query heads, inner width of the feed-forward, factor of RoPE scaling, tied embeddings
_RELEASED = {
    "8b": (4096, 32, 32, 14_336, 8, False),
    "70b": (8192, 80, 64, 28_672, 8, False),
    "405b": (16_384, 126, 128, 53_248, 8, False),
    "1b": (2048, 16, 32, 8192, 32, True),
    "3b": (3072, 28, 24, 8192, 32, True),
}

# dim, layers, query heads, key-value heads
_LADDER = {
    "ladder-40m": (512, 11, 8, 4),
    "ladder-110m": (768, 14, 12, 4),
    "ladder-250m": (1024, 18, 16, 8),
    "ladder-750m": (1536, 24, 24, 8),
    "ladder-1.6b": (2048, 28, 16, 8),
    "ladder-4.5b": (3072, 36, 24, 8),
    "ladder-7b": (4096, 32, 32, 8),
    "ladder-16b": (5120, 46, 40, 8),
}

NAMES = (*_RELEASED, *_LADDER, "tiny")
"""What `preset` knows."""


def preset(name: str) -> TransformerConfig:
    """A new config: "8b", "70b", "405b" (Llama 3.1), "1b", "3b" (Llama 3.2, tied embeddings), a rung of the `ladder`,
    or "tiny", which a CPU trains in minutes.

    Raises:
        ValueError: no such preset.
    """
    if name in _RELEASED:
        dim, n_layers, n_heads, ffn_dim, factor, tied = _RELEASED[name]
        return TransformerConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=8,
            ffn_dim=ffn_dim,
            vocab_size=VOCAB_SIZE,
            rope_scaling=RopeScaling(factor=factor),
            max_seq_len=131_072,
            tie_embeddings=tied,
        )
    if name in _LADDER:
        dim, n_layers, n_heads, n_kv_heads = _LADDER[name]
        return TransformerConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            ffn_dim=7 * dim // 2,
            vocab_size=VOCAB_SIZE,
        )
    if name == "tiny":
        return TransformerConfig(
            dim=192,
            n_layers=6,
            n_heads=6,
            n_kv_heads=2,
            ffn_dim=512,
            vocab_size=1536,
            max_seq_len=1024,
            tie_embeddings=True,
        )
    raise ValueError(f"no preset {name!r}; there are {', '.join(NAMES)}")


def ladder() -> dict[str, TransformerConfig]:
    """The sizes of a scaling-law sweep by name, smallest first: 40M to 16B parameters besides embedding and output, as
    in section 3.2.1. The paper gives the range alone; the shapes are ours, between the proportions of the 8B model
    (feed-forward 3.5 times the width) and narrower heads at the low end."""
    return {name: preset(name) for name in _LADDER}
