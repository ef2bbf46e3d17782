"""Compositional multimodal models: one language model, kept unchanged, and the senses grafted onto it.

import herdkit

model = herdkit.load("runs/tiny-herd/model")
model.chat([{"role": "user", "content": [
    {"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "what is left of the circle?"}]}])
"""

from .adapters.compose import ComposedModel, compose
from .adapters.model_directory import load, save

__all__ = ["ComposedModel", "compose", "load", "save"]
__version__ = "0.1.0"
