"""Compositional multimodal models: one language model, kept unchanged, and the senses grafted onto it.

import herdkit

model = herdkit.load("runs/tiny-herd/model")
model.chat([{"role": "user", "content": [
    {"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "what is left of the circle?"}]}])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.compose import ComposedModel, compose
    from .adapters.model_directory import load, save

__all__ = ["ComposedModel", "compose", "load", "save"]
__version__ = "0.1.0"

_HOMES = {"ComposedModel": "compose", "compose": "compose", "load": "model_directory", "save": "model_directory"}


def __getattr__(name: str) -> Any:
    """Models are imported when they are asked for: `herdkit.data` alone needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module 'herdkit' has no attribute {name!r}")
    return getattr(import_module(f".adapters.{_HOMES[name]}", __name__), name)
