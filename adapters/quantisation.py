"""Weights of 8 bits for decoding with adapters; see `herdkit.text.quantisation`."""

from __future__ import annotations

from ..text import quantisation
from .compose import ComposedModel


def quantise(model: ComposedModel) -> ComposedModel:
    """Rounds what every new token is multiplied with: the matrices of the language model but its embedding, and those
    of interleaved layers. Encoders, which run once an input, stay as they are.

    Args:
        model: changed in place, and returned.

    Raises:
        ModuleNotFoundError: torchao is not installed; names the extra.
    """
    quantisation.quantise(model.text)
    for adapter in model.adapters.values():
        for layer in adapter.interleaved().values():
            quantisation.round_matrices(layer)
    return model
