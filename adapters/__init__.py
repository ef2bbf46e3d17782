"""How a sense joins the language model: the contract, the composed model, and bridges any encoder can use."""

from .batching import Batch, DialogCollator, Port
from .compose import ComposedCache, ComposedModel, compose
from .contract import Adapter, Contribution, InputLoss, InterleavedLayer, ModalityBatch, Placements, Preparation
from .cross_attention import GatedCrossAttention
from .model_directory import ModelDirectoryError, attach_adapters, load, load_ports, save
from .objective import DialogObjective
from .projector import Projector
from .registry import adapter_class, adapter_names, register_adapter
from .resampler import PerceiverResampler

__all__ = [
    "Adapter",
    "Batch",
    "ComposedCache",
    "ComposedModel",
    "Contribution",
    "DialogCollator",
    "DialogObjective",
    "GatedCrossAttention",
    "InputLoss",
    "InterleavedLayer",
    "ModalityBatch",
    "ModelDirectoryError",
    "PerceiverResampler",
    "Placements",
    "Port",
    "Preparation",
    "Projector",
    "adapter_class",
    "adapter_names",
    "attach_adapters",
    "compose",
    "load",
    "load_ports",
    "register_adapter",
    "save",
]
