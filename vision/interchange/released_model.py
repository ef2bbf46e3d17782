"""What both layouts of Llama 3.2 Vision ask of a model."""

from __future__ import annotations

from ...adapters.compose import ComposedModel
from ..encoder import VisionTransformer
from ..image_adapter import ImageAdapter


def parts_of(model: ComposedModel) -> tuple[ImageAdapter, VisionTransformer]:
    """The image adapter of a model that has one of ours, and its encoder."""
    adapter = model.adapters["image"]
    assert isinstance(adapter, ImageAdapter)
    assert isinstance(adapter.encoder, VisionTransformer)
    return adapter, adapter.encoder


def refusal(model: ComposedModel) -> str | None:
    """What stands against writing a model as a Llama 3.2 Vision; None where nothing does."""
    image = model.adapters.get("image")
    if model.modalities != ["image"] or not isinstance(image, ImageAdapter):
        return "it holds a language model with our image adapter alone"
    encoder, adapter, text = image.encoder, image.config, model.text.config
    if not isinstance(encoder, VisionTransformer):
        return f"the encoder must be a VisionTransformer, not a {type(encoder).__name__}"
    wanted = {"attention_bias": False, "patch_bias": False, "patch_norm": False, "input_norm": True, "norm_eps": 1e-5}
    wanted |= {"padding": "released"}
    for name, value in wanted.items():
        if getattr(encoder.config, name) != value:
            hint = f"; see ImageAdapter.change_encoder({name}={value!r})" if name == "padding" else ""
            return f"encoder.{name} must be {value!r}, not {getattr(encoder.config, name)!r}{hint}"
    if encoder.max_tiles < 2:
        return "encoder.max_tiles must be at least 2"
    if adapter.memory_positions or (adapter.ffn_dim or text.ffn_dim) != text.ffn_dim:
        return "memory_positions must be 0, and ffn_dim that of the language model"
    if text.tie_embeddings:
        return "the language model's embedding must not be tied to its output"
    return None
