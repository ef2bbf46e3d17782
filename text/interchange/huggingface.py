"""Hugging Face's Llama layout, in and out. Hugging Face rotates halves of a head where Meta (and we) rotate
adjacent pairs, so the rows of the query and key projections are reordered within each head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from einops import rearrange
from tokenizers import processors
from torch import Tensor

from ..chat_template import CHAT_TEMPLATE
from ..model import RopeScaling, Transformer, TransformerConfig
from ..tokenizer import Tokenizer
from .directory_weights import StoredWeights, TrainedWeights
from .tensor_files import (
    ModelDirectoryError,
    Piece,
    StoredTensors,
    integer,
    open_tensors,
    read_json,
    shape_faults,
    write_json,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

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


def load_huggingface(path: Path, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a directory with `config.json` and `model.safetensors`, or its shards and their index.

    Args:
        dtype: None for that of the files.

    Raises:
        ModelDirectoryError: see `open_huggingface` and `herdkit.text.interchange.tensor_files.fill`.
    """
    return open_huggingface(path).load(dtype)


def open_huggingface(path: Path) -> StoredWeights:
    """The weights of such a directory, to be read.

    Raises:
        ModelDirectoryError: see `config_from_hf`; no weights in safetensors; an index that names anything but
            safetensors files beside it.
    """
    content = read_json(path / "config.json")
    try:
        config = config_from_hf(content)
    except ValueError as error:
        raise ModelDirectoryError(f"{path / 'config.json'}: {error}") from error
    with torch.device("meta"):
        model = Transformer(config)
    files = files_by_name(path)
    pieces: dict[Path, list[Piece]] = {file: [] for file in files.values()}
    faults = []
    wanted = {hf_name(name): name for name in model.state_dict()}
    if config.tie_embeddings and "lm_head.weight" in files:
        wanted["lm_head.weight"] = "tok_embeddings.weight"
    for stored, name in wanted.items():
        if stored in files:
            piece = Piece(stored, name)
            if rotated_heads(config, name):
                piece = Piece(stored, name, arrange=partial(to_pairs, width=config.head_dim), block=config.head_dim)
            pieces[files[stored]].append(piece)
        else:
            faults.append(f"{path}: missing {stored}")
    ignored = [name for name in files if name.endswith("rotary_emb.inv_freq")]
    return StoredWeights(config, StoredTensors(pieces, model.state_dict(), ignored, faults))


def files_by_name(path: Path) -> dict[str, Path]:
    """Which file of the directory holds a tensor.

    Raises:
        ModelDirectoryError: there are no weights in safetensors, or the index names anything but files beside it.
    """
    if (path / WEIGHTS).is_file():
        with open_tensors(path / WEIGHTS) as opened:
            return dict.fromkeys(opened.names(), path / WEIGHTS)
    index = path / INDEX
    if not index.is_file():
        raise ModelDirectoryError(f"{path}: neither {WEIGHTS} nor {INDEX}; weights in other formats are not read")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelDirectoryError(f"{index}: 'weight_map' is missing or empty or no object")
    for name, file in listed.items():
        # The index comes from a stranger. Links are followed: the hub's own cache is made of them.
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise ModelDirectoryError(f"{index}: {name} is in {file!r}, which names no safetensors file beside it")
    return {name: path / file for name, file in listed.items()}


def save_huggingface(
    model: Transformer | TrainedWeights, tokenizer: Tokenizer | None, path: Path, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Fills a directory that transformers and vLLM load. All processes that share the weights call it.

    Args:
        max_shard_bytes: a file holds more only where one tensor does.

    Raises:
        ValueError: max_shard_bytes is not positive.
    """
    weights = TrainedWeights.of(model)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in weights.tensors.kinds.items()}
    shards = split_sizes(sizes, max_shard_bytes)
    for file, names in shards.items():
        weights.write(path / file, names, partial(_to_hf, weights.config))
    if not weights.first:
        return
    write_index({file: map(hf_name, names) for file, names in shards.items()}, sum(sizes.values()), path)
    dtype = str(weights.tensors.kinds["tok_embeddings.weight"][1]).removeprefix("torch.")
    # transformers 4 reads the second of the two names.
    config = config_to_hf(weights.config) | {"dtype": dtype, "torch_dtype": dtype}
    if tokenizer is None:
        write_json(path / "config.json", config)
        return
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
    write_json(path / "config.json", config | ids)
    # Sampling as the released models recommend it.
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_json(path / "generation_config.json", {**ids, "pad_token_id": tokenizer.pad_id, **sampling})
    save_tokenizer(tokenizer, path, weights.config.max_seq_len)


def split_sizes(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """The names of tensors by the file that is to hold them, in order: as many files as it takes.

    Args:
        sizes: of the tensors in bytes.
        max_shard_bytes: a file holds more only where one tensor does.

    Raises:
        ValueError: max_shard_bytes is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def write_index(shards: Mapping[str, Iterable[str]], total_size: int, path: Path) -> None:
    """Says which file holds which of the stored names, where there are several.

    Args:
        total_size: of all tensors in bytes.
    """
    if len(shards) > 1:
        listed = {name: file for file, names in shards.items() for name in names}
        write_json(path / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(listed.items()))})


def save_tokenizer(
    tokenizer: Tokenizer, path: Path, max_length: int, template: str = CHAT_TEMPLATE, text: str | None = None
) -> None:
    """Writes the tokenizer for transformers.

    Args:
        max_length: longest row of the model.
        template: Jinja template of its chat format.
        text: of another `tokenizer.json` than the tokenizer's own, in which the special tokens named here are.
    """
    ids = tokenizer.bos_id, tokenizer.eot_id, tokenizer.pad_id
    bos, eot, pad = (tokenizer.decode([id], keep_special=True) for id in ids)
    # As released: a text alone gets its beginning marked; the chat template writes that itself.
    backend = tokenizers.Tokenizer.from_str(text or tokenizer.to_json())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    (path / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eot,
        "pad_token": pad,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(path / "tokenizer_config.json", settings)


def from_hf_state_dict(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `LlamaForCausalLM` under our names and in our layout.

    Raises:
        ValueError: names every missing, surplus and ill-shaped tensor, by Hugging Face's name.
    """
    with torch.device("meta"):
        wanted = {hf_name(name): (name, weight) for name, weight in Transformer(config).state_dict().items()}
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in found:
        embedding = found.get("model.embed_tokens.weight")
        if embedding is not None and torch.equal(found["lm_head.weight"], embedding):
            del found["lm_head.weight"]
    faults = shape_faults(
        {name: tuple(weight.shape) for name, (_, weight) in wanted.items()},
        {name: tuple(tensor.shape) for name, tensor in found.items()},
    )
    if faults:
        raise ValueError("the tensors do not fit the config: " + "; ".join(faults))
    converted = {}
    for name, (ours, _) in wanted.items():
        heads = rotated_heads(config, ours)
        converted[ours] = to_pairs(found[name], config.head_dim) if heads else found[name]
    return converted


def to_hf_state_dict(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `Transformer`, or a part of it, as that of a `LlamaForCausalLM`; a tied output
    projection is left out, as in Hugging Face's own files."""
    return dict(_to_hf(config, name, tensor) for name, tensor in tensors.items())


def _to_hf(config: TransformerConfig, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if heads := rotated_heads(config, name):
        tensor = to_halves(tensor, heads)
    return hf_name(name), tensor


def to_pairs(weight: Tensor, width: int) -> Tensor:
    """Rows in Hugging Face's order to ours, of any number of heads."""
    return rearrange(weight, "(h two half) d -> (h half two) d", half=width // 2, two=2)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows in our order to Hugging Face's."""
    return rearrange(weight, "(h half two) d -> (h two half) d", h=heads, two=2)


def rotated_heads(config: TransformerConfig, name: str) -> int:
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
            raise ValueError(f"{key} is {hf[key]!r}; a Llama model has {value!r}")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"{key} is set; a Llama 3 model has no biases")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported; default and llama3 are")
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
            dim=integer(hf, "hidden_size"),
            n_layers=integer(hf, "num_hidden_layers"),
            n_heads=integer(hf, "num_attention_heads"),
            n_kv_heads=integer(hf, "num_key_value_heads", hf["num_attention_heads"]),
            ffn_dim=integer(hf, "intermediate_size"),
            vocab_size=integer(hf, "vocab_size"),
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
            rope_scaling=scaling,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_seq_len=integer(hf, "max_position_embeddings", 2048),
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    if (hf.get("head_dim") or config.head_dim) != config.head_dim:
        raise ValueError(f"head_dim is {hf['head_dim']}, not hidden_size / num_attention_heads")
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
