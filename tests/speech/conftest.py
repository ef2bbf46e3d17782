"""A small model with a speech adapter."""

import pytest
import torch
from herdkit.adapters.compose import ComposedModel
from herdkit.speech import ConformerConfig, SpeechAdapter, SpeechAdapterConfig
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def speaking() -> ComposedModel:
    """Random weights: it answers something, and its CTC head spells something."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["red star go left what is two plus one . "] * 20, 540)
    text = TransformerConfig(
        dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=48, vocab_size=tokenizer.vocab_size, max_seq_len=512
    )
    config = SpeechAdapterConfig(
        conformer=ConformerConfig(dim=24, n_layers=1, n_heads=2, ffn_dim=40),
        dim=32, ffn_dim=48, n_heads=4, ctc_classes=257, output_scale=1.0, max_seconds=20.0,
    )  # fmt: skip
    model = ComposedModel(Transformer(text), tokenizer)
    model.attach(SpeechAdapter(config, text))
    return model.eval()
