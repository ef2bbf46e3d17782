"""Sizes of the paper's models (table 3, section 3.2 of "The Llama 3 Herd of Models", arXiv 2407.21783), of the
later small releases and of a tiny one.

The paper gives a vocabulary of 128,000; the released tokenizer adds 256 special tokens. RoPE scaling is in
the released 3.1 models, not in the paper.
"""

from __future__ import annotations

from .model import RopeScaling, TransformerConfig

VOCAB_SIZE = 128_256


def _llama(dim: int, n_layers: int, n_heads: int, ffn_dim: int, *, factor: float, tied: bool) -> TransformerConfig:
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


def preset(name: str) -> TransformerConfig:
    """A new config: "8b", "70b", "405b" (Llama 3.1), "1b", "3b" (Llama 3.2, tied embeddings), or "tiny", which
    a CPU trains in minutes.

    Raises:
        ValueError: no such preset.
    """
    if name == "8b":
        return _llama(4096, 32, 32, 14_336, factor=8, tied=False)
    if name == "70b":
        return _llama(8192, 80, 64, 28_672, factor=8, tied=False)
    if name == "405b":
        return _llama(16_384, 126, 128, 53_248, factor=8, tied=False)
    if name == "1b":
        return _llama(2048, 16, 32, 8192, factor=32, tied=True)
    if name == "3b":
        return _llama(3072, 28, 24, 8192, factor=32, tied=True)
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
    raise ValueError(f"no preset {name!r}; there are 1b, 3b, 8b, 70b, 405b and tiny")
