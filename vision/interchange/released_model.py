"""What both layouts of Llama 3.2 Vision ask of a model."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch

from ...adapters.compose import ComposedModel
from ...adapters.deferred import read_adapter
from ...adapters.layouts import ComposedLayout
from ...text.interchange.tensor_files import StoredTensors
from ...text.weights import SourcedWeights, Weights
from ...train.portions import PartOf
from ..encoder import VisionTransformer
from ..image_adapter import ImageAdapter
from .tile_tables import tell_by_place


class ReleasedLayout(ComposedLayout):
    """One of both."""

    @abstractmethod
    def stored(self, path: Path) -> tuple[ComposedModel, StoredTensors]:
        """What `build` gives, and its weights by the names of its parameters.

        Raises:
            ModelDirectoryError: as `build`.
        """

    def load(self, path: Path, dtype: torch.dtype | None = None) -> ComposedModel:
        model, tensors = self.stored(path)
        tensors.fill(model, dtype)
        tell_by_place(parts_of(model)[0])
        return model

    def open(self, path: Path) -> tuple[ComposedModel, Weights]:
        model, tensors = self.stored(path)
        adapter = parts_of(model.float())[0]
        read_adapter(adapter, PartOf(tensors, "image."))
        tell_by_place(adapter)
        return model, SourcedWeights(model.text.config, PartOf(tensors, "text."))

    def refusal(self, model: ComposedModel) -> str | None:
        return refusal(model)


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
