"""A language model's weights on their way from and to directories, whatever the layout of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor

from ...train.parallel import rank
from ...train.portions import Portion, WholeTensors
from ..model import Transformer, TransformerConfig
from ..weights import Weights
from .tensor_files import StoredTensors, write_tensors


@dataclass(frozen=True)
class StoredWeights(Weights):
    """Those of a model directory. Files that do not fit are found when it is opened and reported when it is read.

    Args:
        tensors: under the names of the model's parameters.
    """

    tensors: StoredTensors

    def read(self, into: Mapping[str, Portion]) -> None:
        """
        Raises:
            ModelDirectoryError: see `herdkit.text.interchange.tensor_files.fill`.
        """
        self.tensors.read(into)

    def load(self, dtype: torch.dtype | None = None) -> Transformer:
        """The whole model, on the CPU. Arguments and errors: see `herdkit.text.interchange.tensor_files.fill`."""
        model = self.outline()
        self.tensors.fill(model, dtype)
        return model


Convert = Callable[[str, Tensor], tuple[str, Tensor]]
"""From a name and a tensor to the name in a file and a tensor of the same size."""


def unchanged(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return name, tensor


def write(tensors: WholeTensors, file: Path, names: Sequence[str] | None = None, convert: Convert = unchanged) -> None:
    """Some tensors, or all, as safetensors; one at a time is whole in memory. All processes that share them call it."""
    names = list(tensors.kinds) if names is None else names
    converted = starmap(convert, tensors.of_file(names))
    if not tensors.writes(names):
        assert not list(converted)
        return
    kinds = {}
    for name in names:
        shape, dtype = tensors.kinds[name]
        renamed, outline = convert(name, torch.empty(shape, dtype=dtype, device="meta"))
        kinds[renamed] = (tuple(outline.shape), dtype)
    write_tensors(file, kinds, converted)


@dataclass(frozen=True)
class TrainedWeights:
    """Those of a model in memory, of one process or of several that share it: then all of them make it together, and
    call together what writes it.

    Args:
        tensors: the parameters, in the model's order.
    """

    config: TransformerConfig
    tensors: WholeTensors

    @classmethod
    def of(cls, model: Transformer | TrainedWeights) -> TrainedWeights:
        return model if isinstance(model, TrainedWeights) else cls(model.config, WholeTensors(model.state_dict()))

    @property
    def first(self) -> bool:
        """Whether this process writes what belongs to no tensor."""
        return not self.tensors.shared or rank() == 0

    def write(self, file: Path, names: Sequence[str] | None = None, convert: Convert = unchanged) -> None:
        """Some of the tensors, or all; see the function of this name."""
        write(self.tensors, file, names, convert)
