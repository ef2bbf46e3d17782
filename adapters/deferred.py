"""Interleaved layers without memory, the bulk of an adapter's weights: whoever shares a model out makes those that a
process keeps, and reads of each what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..text.interchange.tensor_files import shape_faults
from ..train.portions import HeldTensors, PartOf, Portion, Source, portions
from .contract import Adapter, InterleavedLayer

_seed: ContextVar[int | None] = ContextVar("seed", default=None)


@contextmanager
def without_memory(seed: int = 0) -> Iterator[None]:
    """Meanwhile `interleaved_layers` makes layers on the meta device.

    Args:
        seed: of their weights, the same on every layout, where none are read from elsewhere.
    """
    before = _seed.set(seed)
    try:
        yield
    finally:
        _seed.reset(before)


def interleaved_layers(modality: str, makers: Mapping[int, Callable[[], InterleavedLayer]]) -> nn.ModuleDict:
    """The layers of an adapter by the number, as text, of the text layer that each runs before. An adapter that makes
    its layers so can be trained where no process has memory for all of them.

    Args:
        makers: each makes a layer, with random weights; such a layer has no buffers.
    """
    layers, seed = nn.ModuleDict(), _seed.get()
    for place, make in makers.items():
        if seed is None:
            layer = make()
        else:
            with torch.device("meta"):
                layer = make()
            layer.source = DrawnLayer(make, seed, f"{modality}.{place}")
        layers[str(place)] = layer
    return layers


@dataclass(frozen=True)
class DrawnLayer:
    """Random weights of a layer, from a generator that `seed` and the layer's name give. To read some of them, all of
    the layer are drawn, on the CPU."""

    make: Callable[[], InterleavedLayer]
    seed: int
    name: str

    def read(self, into: Mapping[str, Portion]) -> None:
        words = np.random.SeedSequence([self.seed, *self.name.encode()]).generate_state(2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(words[0]) << 32 | int(words[1]))
            layer = self.make()
        HeldTensors(layer.state_dict()).read(into)


def has_memory(layer: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in layer.parameters())


def source_of(layer: InterleavedLayer) -> Source:
    """Where the weights of a layer are to be had."""
    if has_memory(layer):
        return HeldTensors(layer.state_dict())
    assert layer.source is not None, "a layer on the meta device without a source of weights"
    return layer.source


def take_weights(layer: InterleavedLayer, other: InterleavedLayer) -> None:
    """Gives a layer the weights of another, at once, or when it gets memory.

    Raises:
        ValueError: the other is of another size.
    """
    ours, theirs = ({name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (layer, other))
    if faults := shape_faults(ours, theirs):
        raise ValueError(f"is of another size: {'; '.join(faults)}")
    if has_memory(layer):
        source_of(other).read(portions(layer.state_dict()))
    else:
        layer.source = source_of(other)


def read_adapter(adapter: Adapter, source: Source) -> None:
    """Fills an adapter on the CPU, or on the meta device: then it gets its memory here, all but its layers. Layers
    without memory are to be read from there later."""
    deferred = {layer for layer in adapter.interleaved().values() if not has_memory(layer)}
    later = {module for layer in deferred for module in layer.modules()}
    for name, module in adapter.named_modules():
        if module in deferred:
            module.source = PartOf(source, f"{name}.")  # type: ignore[assignment]
        elif module not in later and any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    source.read(portions({name: tensor for name, tensor in adapter.state_dict().items() if not tensor.is_meta}))


def read_layers(layers: Iterable[InterleavedLayer], device: torch.device) -> None:
    """Gives layers without memory theirs, and what this process keeps of their weights."""
    for layer in layers:
        if not has_memory(layer):
            source = source_of(layer)
            layer.to_empty(device=device)
            source.read(portions(dict(layer.named_parameters())))
            layer.source = None
