"""Whole contrastive models of open_clip, both towers, in and out: directories with `open_clip_config.json` and
`open_clip_model.safetensors`, which open_clip takes as "local-dir:<path>"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...text.interchange.tensor_files import ModelDirectoryError, read_json, save_tensors, shape_faults, write_json
from ...text.model_directory import writing
from ...text.tokenizer import Tokenizer
from ..contrastive import ContrastiveModel, TextTower, TextTowerConfig
from ..encoder import CLIP_MEAN, CLIP_STD, VisionConfig, VisionTransformer
from .towers import read_state

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

_TOP = {
    "vision.class_embedding": "visual.class_embedding",
    "vision.patch_embedding.weight": "visual.conv1.weight",
    "vision.position_embedding": "visual.positional_embedding",
    "vision.input_norm.weight": "visual.ln_pre.weight",
    "vision.input_norm.bias": "visual.ln_pre.bias",
    "vision.norm.weight": "visual.ln_post.weight",
    "vision.norm.bias": "visual.ln_post.bias",
    "image_projection.weight": "visual.proj",
    "text.token_embedding.weight": "token_embedding.weight",
    "text.position_embedding": "positional_embedding",
    "text.norm.weight": "ln_final.weight",
    "text.norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.in_proj",
    "attention.out": "attn.out_proj",
    "mlp_norm": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TRANSPOSED = ("image_projection.weight", "text_projection.weight")
# What our configs cannot say of a model of open_clip, by what it must be.
_PLAIN_MODEL = {"custom_text": False, "multimodal_cfg": None}
_PLAIN_BLOCKS = {"ls_init_value": None, "block_type": None, "act_kwargs": None, "norm_kwargs": None}
_PLAIN_BLOCKS |= dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), False)
_PLAIN_BLOCKS |= dict.fromkeys(("scale_attn", "scale_fc", "final_ln_after_pool"), False)
_PLAIN_VISION = _PLAIN_BLOCKS | {"attentional_pool": False, "no_ln_pre": False}
_PLAIN_VISION |= {"pos_embed_type": "learnable", "timm_model_name": None}
_PLAIN_TEXT = _PLAIN_BLOCKS | {"embed_cls": False, "no_causal_mask": False, "proj_bias": False}
_PLAIN_TEXT |= {"proj_type": "linear", "hf_model_name": None}
_VISION_POOLS = {"tok": "class", "avg": "mean"}
# "last" is the last place of a padded row there, whatever stands at it.
_TEXT_POOLS = ("argmax", "eos")


def open_clip_refusal(model: ContrastiveModel) -> str | None:
    """Why open_clip cannot hold a model; None where it can."""
    vision, text = model.vision, model.text
    if not isinstance(vision, VisionTransformer) or not isinstance(text, TextTower):
        return f"the towers are {type(vision).__name__} and {type(text).__name__}, not VisionTransformer and TextTower"
    config = vision.config
    wanted = {"n_global_layers": 0, "taps": (), "max_tiles": 1, "patch_norm": False, "input_norm": True}
    wanted |= {"norm_eps": 1e-5, "patch_bias": False}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            return f"encoder.{name} must be {value!r}, not {getattr(config, name)!r}"
    if config.activation != "gelu":
        return f"encoder.activation must be 'gelu', that of the text tower, not {config.activation!r}"
    if text.config.attention != "causal" or text.config.norm_eps != 1e-5:
        return "the text tower must be causal, with norm_eps 1e-5"
    if isinstance(model.text_projection, torch.nn.Identity):
        return "the towers must have a common space of their own (embedding_dim)"
    return None


def save_open_clip(model: ContrastiveModel, path: str | Path, tokenizer: Tokenizer) -> Path:
    """Writes a directory that `open_clip.create_model("local-dir:...")` loads, and with it the tokenizer, with which
    captions must be encoded as `herdkit.vision.pairs.encode_captions` does.

    Raises:
        ValueError: open_clip cannot hold the model, see `open_clip_refusal`.
        FileExistsError: `path` exists and is no model directory.
    """
    if reason := open_clip_refusal(model):
        raise ValueError(f"open_clip has no place for this model: {reason}")
    with writing(path) as fresh:
        save_tensors(to_open_clip(model), fresh / WEIGHTS)
        write_json(fresh / CONFIG, _config_to_open_clip(model, tokenizer))
        # What `writing` knows model directories by.
        write_json(fresh / "config.json", {"model_type": "open_clip"})
        tokenizer.save(fresh / "tokenizer.json")
    return Path(path)


def load_open_clip_model(path: str | Path) -> ContrastiveModel:
    """The contrastive model of a directory with `open_clip_config.json` and its weights, in eval mode. The text tower
    reads the state of a caption's last token: where the tokenizer ends captions with the token of `eos_id`, or with
    the one of the highest id, pooling by "eos" and "argmax" does the same. Of the preprocessing, mean and deviation
    are read; how pictures are resized is up to who makes the tiles.

    Raises:
        ModelDirectoryError: a file is missing, or the model has something that ours have not; names every tensor that
            is missing, surplus or ill-shaped.
    """
    path = Path(path)
    content = read_json(path / CONFIG)
    try:
        model = model_of_config(content.get("model_cfg", content), content.get("preprocess_cfg") or {})
        state = from_open_clip(model, read_state(path / WEIGHTS))
    except ValueError as error:
        raise ModelDirectoryError(f"{path}: {error}") from error
    model.load_state_dict(state)
    return model.eval()


def to_open_clip(model: ContrastiveModel) -> dict[str, Tensor]:
    """The state of an `open_clip.CLIP` with the same weights; biases of attention that ours lacks are zeros."""
    assert isinstance(model.vision, VisionTransformer)
    assert isinstance(model.text, TextTower)
    out = {}
    for name, tensor in model.state_dict().items():
        out[_their_name(name)] = _arranged(name, tensor.detach(), model.vision.config)
    dim = model.vision.config.dim
    for i in range(model.vision.config.n_layers):
        prefix = f"visual.transformer.resblocks.{i}.attn."
        for bias, width in (("in_proj_bias", 3 * dim), ("out_proj.bias", dim)):
            out.setdefault(prefix + bias, model.logit_scale.new_zeros(width))
    return out


def from_open_clip(model: ContrastiveModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `model`, built for it, from that of an `open_clip.CLIP`.

    Raises:
        ValueError: names every tensor that is missing, surplus or ill-shaped.
    """
    assert isinstance(model.vision, VisionTransformer)
    config = model.vision.config
    wanted = {_their_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    found = {name: tensor for name, tensor in state.items() if name != "attn_mask"}
    shapes = {}
    for stored, (name, tensor) in wanted.items():
        shape = tuple(_arranged(name, tensor, config).shape)
        if name in ("logit_scale", "logit_bias") and stored in found:
            shape = tuple(found[stored].shape)
        shapes[stored] = shape
    if faults := shape_faults(shapes, {name: tuple(tensor.shape) for name, tensor in found.items()}):
        raise ValueError("the weights do not fit: " + "; ".join(faults))
    out = {}
    for stored, (name, tensor) in wanted.items():
        theirs = found[stored].T if name in _TRANSPOSED else found[stored]
        out[name] = theirs.reshape(tensor.shape)
    return out


def _arranged(name: str, tensor: Tensor, config: VisionConfig) -> Tensor:
    if name == "vision.patch_embedding.weight":
        return tensor.view(-1, 3, config.patch_size, config.patch_size)
    if name in ("logit_scale", "logit_bias"):
        return tensor[0]
    return tensor.T if name in _TRANSPOSED else tensor


def _their_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    tower, number, part = re.fullmatch(r"(vision|text)\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    stem, _, end = part.rpartition(".")
    join = "_" if stem == "attention.qkv" else "."
    prefix = "visual." if tower == "vision" else ""
    return f"{prefix}transformer.resblocks.{number}.{_BLOCK[stem]}{join}{end}"


def _config_to_open_clip(model: ContrastiveModel, tokenizer: Tokenizer) -> dict[str, Any]:
    assert isinstance(model.vision, VisionTransformer)
    assert isinstance(model.text, TextTower)
    vision, text = model.vision.config, model.text.config
    extra = {} if model.logit_bias is None else {"init_logit_bias": 0.0}
    return {
        "model_cfg": {
            "embed_dim": model.image_projection.out_features,
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.n_layers,
                "width": vision.dim,
                "head_width": vision.dim // vision.n_heads,
                "patch_size": vision.patch_size,
                "mlp_ratio": mlp_ratio(vision.ffn_dim, vision.dim),
                "pool_type": "tok" if vision.pooling == "class" else "avg",
            },
            "text_cfg": {
                "context_length": text.max_length,
                "vocab_size": text.vocab_size,
                "width": text.dim,
                "heads": text.n_heads,
                "layers": text.n_layers,
                "mlp_ratio": mlp_ratio(text.ffn_dim, text.dim),
                "pool_type": "eos",
                "eos_id": tokenizer.eos_id,
                "pad_id": 0,
            },
            **extra,
        },
        "preprocess_cfg": {"mean": list(model.vision.mean), "std": list(model.vision.std), "interpolation": "bilinear"},
    }


def model_of_config(content: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> ContrastiveModel:
    """A new model of the sizes in `model_cfg` and with the colours of `preprocess_cfg`.

    Raises:
        ValueError: names the key that is missing, no number, or asks for something that ours have not.
    """
    vision, text = content.get("vision_cfg"), content.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ValueError("vision_cfg or text_cfg is missing in its configuration")
    if content.get("quick_gelu"):
        raise ValueError("quick_gelu is set, which our text tower has not; load its image tower with load_open_clip")
    for where, part, plain in (
        ("", content, _PLAIN_MODEL),
        ("vision_cfg.", vision, _PLAIN_VISION),
        ("text_cfg.", text, _PLAIN_TEXT),
    ):
        for key, value in plain.items():
            if part.get(key, value) != value:
                raise ValueError(f"{where}{key} is {part[key]!r}; only models with {value!r} are read")
    pools = vision.get("pool_type", "tok"), text.get("pool_type", "argmax")
    for where, pool, known in (("vision_cfg", pools[0], tuple(_VISION_POOLS)), ("text_cfg", pools[1], _TEXT_POOLS)):
        if pool not in known:
            raise ValueError(f"{where}.pool_type is {pool!r}; only models with one of {known} are read")
    width, text_width = _size(vision, "vision_cfg.width", 768), _size(text, "text_cfg.width", 512)
    encoder = VisionConfig(
        n_layers=_size(vision, "vision_cfg.layers", 12),
        image_size=_size(vision, "vision_cfg.image_size", 224),
        patch_size=_size(vision, "vision_cfg.patch_size", 16),
        dim=width,
        n_heads=width // _size(vision, "vision_cfg.head_width", 64),
        ffn_dim=_ffn_dim(vision, "vision_cfg.mlp_ratio", width),
        attention_bias=True,
        pooling=_VISION_POOLS[pools[0]],  # type: ignore[arg-type]
        mean=_colours(preprocessing, "mean", CLIP_MEAN),
        std=_colours(preprocessing, "std", CLIP_STD),
    )
    tower = TextTowerConfig(
        vocab_size=_size(text, "text_cfg.vocab_size", 49_408),
        max_length=_size(text, "text_cfg.context_length", 77),
        dim=text_width,
        n_layers=_size(text, "text_cfg.layers", 12),
        n_heads=_size(text, "text_cfg.heads", 8),
        ffn_dim=_ffn_dim(text, "text_cfg.mlp_ratio", text_width),
    )
    shared, bias = _size(content, "embed_dim"), content.get("init_logit_bias")
    return ContrastiveModel(VisionTransformer(encoder), TextTower(tower), shared, initial_bias=bias)


def _size(part: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number, by its full name: lists are the sizes of ResNets and of pictures that are no squares."""
    value = part.get(name.rpartition(".")[2], default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; only models with a positive whole number are read")
    return value


def _ffn_dim(part: Mapping[str, Any], name: str, width: int) -> int:
    ratio = part.get("mlp_ratio", 4.0)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or ratio <= 0:
        raise ValueError(f"{name} is {ratio!r}, not a positive number")
    return int(width * ratio)  # cut off, as there


def mlp_ratio(ffn_dim: int, width: int) -> float:
    """The ratio by which open_clip finds this width again: it cuts off, and a quotient may be rounded down."""
    ratio = ffn_dim / width
    return ratio if int(width * ratio) == ffn_dim else math.nextafter(ratio, math.inf)


def _colours(preprocessing: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = preprocessing.get(key, default)
    if not isinstance(values, list | tuple) or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"preprocess_cfg.{key} is {values!r}, not three numbers")
    return tuple(values)
