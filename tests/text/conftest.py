import random

import pytest
import torch
from herdkit.text import RopeScaling, Tokenizer, Transformer, TransformerConfig, to_hf_state_dict


def magnified(config: TransformerConfig, dtype=torch.float64, seed=0) -> Transformer:
    """A model whose weights are so large that a mistake in positions or masks shows in the logits."""
    model = Transformer(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(1 + 0.2 * noise if weight.dim() == 1 else 0.25 * noise)
    return model


def small(**changes) -> TransformerConfig:
    sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 128}
    return TransformerConfig(**(sizes | changes))


@pytest.fixture(scope="session")
def make_model():
    """make_model(dtype=..., seed=..., **config changes)"""

    def make(dtype=torch.float64, seed=0, **changes):
        return magnified(small(**changes), dtype, seed)

    return make


@pytest.fixture(scope="session")
def make_hf():
    """The `LlamaForCausalLM` with the weights of one of our models. Its config is written out here by hand, so
    that `config_to_hf` is not its own witness."""
    transformers = pytest.importorskip("transformers")

    def make(model: Transformer):
        config = model.config
        rope: dict = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_scaling == RopeScaling():
            rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope |= {"original_max_position_embeddings": 8192}
        hf_config = transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.ffn_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=1e-5,
            max_position_embeddings=131_072,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
        hf = transformers.LlamaForCausalLM(hf_config).to(model.norm.weight.dtype).eval()
        hf.load_state_dict(to_hf_state_dict(config, model.state_dict()), strict=not config.tie_embeddings)
        hf.tie_weights()
        return hf

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmno", k=rng.randint(1, 8))) for _ in range(800)]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(100)]
    return Tokenizer.train([*texts, "system user assistant ipython\n\n"], 1024)
