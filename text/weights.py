"""Where the weights of a language model come from. Every process takes what it keeps of each, one after another: nobody
needs memory for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..train.portions import HeldTensors, Portion, Source
from .model import Transformer, TransformerConfig, init_weight


@dataclass(frozen=True)
class Weights(ABC):
    """
    Args:
        config: of the model that they are of.
    """

    config: TransformerConfig

    @abstractmethod
    def read(self, into: Mapping[str, Portion]) -> None:
        """Fills what this process keeps, by name of the parameter."""

    def outline(self) -> Transformer:
        """The model without memory, on the meta device."""
        with torch.device("meta"):
            return Transformer(self.config)

    def equal(self, other: Weights) -> bool:
        """Whether another model has the same sizes and, in the precision of this one, the same numbers; one tensor of
        each is in memory at a time."""
        return self.config == other.config and all(
            torch.equal(self.tensor(name, parameter), other.tensor(name, parameter))
            for name, parameter in self.outline().named_parameters()
        )

    def tensor(self, name: str, outline: Tensor) -> Tensor:
        """A single one, whole, of the dtype and shape of the parameter `outline`."""
        whole = torch.empty_like(outline, device="cpu").detach()
        self.read({name: Portion(whole, tuple(slice(0, size) for size in whole.shape))})
        return whole


@dataclass(frozen=True)
class HeldWeights(Weights):
    """Those of a model that this process has in memory."""

    model: Transformer

    @classmethod
    def of(cls, model: Transformer) -> HeldWeights:
        return cls(model.config, model)

    def read(self, into: Mapping[str, Portion]) -> None:
        HeldTensors(dict(self.model.named_parameters())).read(into)

    def outline(self) -> Transformer:
        return super().outline().to(self.model.tok_embeddings.weight.dtype)


@dataclass(frozen=True)
class SourcedWeights(Weights):
    """Those that `source` has under the names of the model's parameters."""

    source: Source

    def read(self, into: Mapping[str, Portion]) -> None:
        self.source.read(into)


@dataclass(frozen=True)
class DrawnWeights(Weights):
    """Random ones, as `Transformer.init_weights` describes them. Each parameter has a generator of its own, made from
    `seed` and its name, and is drawn on the CPU: a process that needs no other parameter draws no other, and the
    numbers are the same on any layout and device."""

    seed: int

    @torch.no_grad()
    def read(self, into: Mapping[str, Portion]) -> None:
        shapes = {name: parameter.shape for name, parameter in self.outline().named_parameters()}
        for name, portion in into.items():
            whole = torch.empty(shapes[name])
            words = np.random.SeedSequence([self.seed, *name.encode()]).generate_state(2)
            generator = torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
            init_weight(self.config, name, whole, generator)
            portion.tensor.copy_(whole[portion.region])
