"""The configuration files of Llama 3.2 Vision in Hugging Face's layout, and our configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...adapters.compose import ComposedModel
from ...text.interchange.huggingface import config_from_hf, config_to_hf
from ...text.interchange.tensor_files import integer, read_json
from ...text.model import TransformerConfig
from ..encoder import CLIP_MEAN, CLIP_STD, VisionConfig, VisionTransformer
from ..image_adapter import ImageAdapterConfig
from ..tiles import canvases
from .released_model import parts_of

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def image_token_of(content: Mapping[str, Any]) -> int:
    return integer(content, "image_token_index", integer(content, "image_token_id", 128_256))


def configs_from_hf(
    content: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> tuple[TransformerConfig, ImageAdapterConfig]:
    """Our configs from the content of `config.json` and of `preprocessor_config.json`; what is absent is as in the
    11B model.

    Raises:
        ValueError: a key asks for something that Llama 3.2 Vision does not have.
    """
    for part in ("text_config", "vision_config"):
        if not isinstance(content.get(part), dict):
            raise ValueError(f"{part} is missing or no object")
    text, vision = dict(content["text_config"]), dict(content["vision_config"])
    released = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336}
    released |= {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
    text = released | {"max_position_embeddings": 131_072} | text
    total = integer(text, "num_hidden_layers", 40)
    flat = text.get("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38])
    if not isinstance(flat, list) or list(flat) != sorted(set(flat)):
        raise ValueError(f"text_config.cross_attention_layers must ascend, not {flat}")
    places = [number - index for index, number in enumerate(flat)]
    n_layers = total - len(flat)
    if not places or len(set(places)) < len(places) or places[0] < 0 or places[-1] >= n_layers:
        raise ValueError(
            f"text_config.cross_attention_layers {flat} of {total} layers: every one must come before another of the "
            "other layers"
        )
    config = config_from_hf(text | {"model_type": "llama", "num_hidden_layers": n_layers})
    if config.tie_embeddings:
        raise ValueError("text_config.tie_word_embeddings is set; the embedding has more rows than the output")
    encoder = _encoder_from_hf(vision, preprocessing)
    adapter = ImageAdapterConfig(
        encoder={"type": "herdkit", **dataclasses.asdict(encoder)},
        n_cross_layers=len(places),
        cross_layers=tuple(places),
    )
    width = integer(vision, "vision_output_dim", encoder.width)
    if width != encoder.width:
        raise ValueError(
            f"vision_config.vision_output_dim is {width}, the final state and the taps give {encoder.width}"
        )
    return config, adapter


def _encoder_from_hf(vision: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> VisionConfig:
    tiles = integer(vision, "max_num_tiles", 4)
    ratios = vision.get("supported_aspect_ratios")
    if tiles < 2 or (ratios is not None and [tuple(ratio) for ratio in ratios] != canvases(tiles)):
        raise ValueError(
            f"vision_config: max_num_tiles {tiles} with supported_aspect_ratios {ratios}; there must be at least 2 "
            "tiles, and all arrangements of them in the order of the release"
        )
    activation = vision.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"vision_config.hidden_act {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if vision.get("norm_eps", 1e-5) != 1e-5 or integer(vision, "num_channels", 3) != 3:
        raise ValueError("vision_config: norm_eps must be 1e-5 and num_channels 3")
    return VisionConfig(
        image_size=integer(vision, "image_size", 448),
        patch_size=integer(vision, "patch_size", 14),
        dim=integer(vision, "hidden_size", 1280),
        n_layers=integer(vision, "num_hidden_layers", 32),
        n_heads=integer(vision, "attention_heads", integer(vision, "num_attention_heads", 16)),
        ffn_dim=integer(vision, "intermediate_size", 5120),
        n_global_layers=integer(vision, "num_global_layers", 8),
        taps=tuple(vision.get("intermediate_layers_indices", (3, 7, 15, 23, 30))),
        max_tiles=tiles,
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        tile_tables="arrangement",
        padding="released",
        mean=tuple(preprocessing.get("image_mean", CLIP_MEAN)),
        std=tuple(preprocessing.get("image_std", CLIP_STD)),
    )


def read_preprocessing(path: Path) -> dict[str, Any]:
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return {}
    found = read_json(file)
    if found.get("resample", 2) != 2:
        raise ValueError(
            f"preprocessor_config.json: resample is {found['resample']}; images are resized bilinearly (2)"
        )
    return found


def configs_to_hf(model: ComposedModel, image_token: int) -> dict[str, Any]:
    """The content of `config.json`."""
    (adapter, vision), text = parts_of(model), model.text.config
    encoder, places = vision.config, adapter.config.places(text.n_layers)
    inner = config_to_hf(text) | {"model_type": "mllama_text_model", "num_hidden_layers": text.n_layers + len(places)}
    inner["cross_attention_layers"] = [place + index for index, place in enumerate(places)]
    for surplus in ("architectures", "attention_bias", "mlp_bias"):
        del inner[surplus]
    tokenizer = model.tokenizer
    inner["pad_token_id"] = None  # or else that of the release, which a smaller vocabulary has not
    if tokenizer is not None:
        inner |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
        inner["pad_token_id"] = tokenizer.pad_id
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == encoder.activation)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": image_token,
        "tie_word_embeddings": False,
        "text_config": inner,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": encoder.dim,
            "num_hidden_layers": encoder.n_layers,
            "num_global_layers": encoder.n_global_layers,
            "attention_heads": encoder.n_heads,
            "intermediate_size": encoder.ffn_dim,
            "vision_output_dim": encoder.width,
            "image_size": encoder.image_size,
            "patch_size": encoder.patch_size,
            "norm_eps": encoder.norm_eps,
            "num_channels": 3,
            "hidden_act": activation,
            "max_num_tiles": encoder.max_tiles,
            "intermediate_layers_indices": list(encoder.taps),
            "supported_aspect_ratios": [list(ratio) for ratio in canvases(encoder.max_tiles)],
        },
    }


def preprocessing_to_hf(encoder: VisionTransformer) -> dict[str, Any]:
    size = {"height": encoder.image_size, "width": encoder.image_size}
    steps = dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad"), True)
    return {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        **steps,
        "size": size,
        "max_image_tiles": encoder.max_tiles,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
