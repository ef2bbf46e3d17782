"""Hugging Face's Llama layout, in and out. Hugging Face rotates halves of a head where Meta (and we) rotate
adjacent pairs, so the rows of the query and key projections are reordered within each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .model import RopeScaling, Transformer, TransformerConfig

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    """Our parameter name in Hugging Face's words."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def from_hf_state_dict(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `LlamaForCausalLM` under our names and in our layout.

    Raises:
        ValueError: names every missing, surplus and ill-shaped tensor, by Hugging Face's name.
    """
    with torch.device("meta"):
        wanted = {hf_name(name): (name, weight) for name, weight in Transformer(config).state_dict().items()}
    surplus = {name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in surplus:
        head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
        if embedding is not None and torch.equal(head, embedding):
            surplus.remove("lm_head.weight")
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"surplus {name}" for name in sorted(surplus)]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(weight.shape)}"
        for name, (_, weight) in wanted.items()
        if name in tensors and tensors[name].shape != weight.shape
    ]
    if problems:
        raise ValueError("the tensors do not fit the config: " + "; ".join(problems))
    converted = {}
    for name, (ours, _) in wanted.items():
        tensor = tensors[name]
        if heads := _rotated_heads(config, ours):
            tensor = rearrange(tensor, "(h two half) d -> (h half two) d", h=heads, two=2)
        converted[ours] = tensor
    return converted


def to_hf_state_dict(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `Transformer` as that of a `LlamaForCausalLM`; a tied output projection is left
    out, as in Hugging Face's own files."""
    converted = {}
    for name, tensor in tensors.items():
        if heads := _rotated_heads(config, name):
            tensor = rearrange(tensor, "(h half two) d -> (h two half) d", h=heads, two=2)
        converted[hf_name(name)] = tensor
    return converted


def _rotated_heads(config: TransformerConfig, name: str) -> int:
    """How many heads of rotated rows our parameter has."""
    if name.endswith("attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("attention.wk.weight") else 0


def config_from_hf(hf: Mapping[str, Any]) -> TransformerConfig:
    """Our config from the content of a Hugging Face `config.json`, with `rope_parameters` (transformers 5) or
    with `rope_theta` and `rope_scaling` (before).

    Raises:
        ValueError: a key is missing, or asks for something that a Llama 3 model does not have.
    """
    for key, value in (("model_type", "llama"), ("hidden_act", "silu")):
        if hf.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {hf[key]!r}; a Llama model has {value!r}")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"config.json: {key} is set; a Llama 3 model has no biases")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported; default and llama3 are")
    try:
        scaling = None
        if kind == "llama3":
            scaling = RopeScaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_seq_len=rope["original_max_position_embeddings"],
            )
        config = TransformerConfig(
            dim=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            ffn_dim=hf["intermediate_size"],
            vocab_size=hf["vocab_size"],
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
            rope_scaling=scaling,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_seq_len=hf.get("max_position_embeddings", 2048),
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]} is missing") from None
    if (hf.get("head_dim") or config.head_dim) != config.head_dim:
        raise ValueError(f"config.json: head_dim is {hf['head_dim']}, not hidden_size / num_attention_heads")
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The content of a Hugging Face `config.json`, for transformers 5 and, by the older keys, for 4."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
    }
