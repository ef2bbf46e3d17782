"""Composed models in the layouts of others, ours to read and anyone's to add: packages declare what they can read and
write in the entry-point group `herdkit.layouts`.

The name of an entry point says for which directories it stands: "huggingface.<model_type>" for those whose
`config.json` has that model type, "meta.vision" for those of Meta whose `params.json` has cross-attention layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from ..text.interchange.meta import PARAMS
from ..text.interchange.tensor_files import read_json
from ..text.model_directory import find_layout
from ..text.weights import HeldWeights, Weights
from .compose import ComposedModel

GROUP = "herdkit.layouts"


class ComposedLayout(ABC):
    """A layout of others that holds a language model and adapters."""

    @abstractmethod
    def build(self, path: Path) -> ComposedModel:
        """The model of a directory on the meta device, with its tokenizer where there is one: no weights are read.

        Raises:
            ModelDirectoryError: what is there cannot be understood.
        """

    @abstractmethod
    def load(self, path: Path, dtype: torch.dtype | None = None) -> ComposedModel:
        """The model of a directory with its weights, on the CPU.

        Args:
            dtype: of the parameters; None for that of the files.

        Raises:
            ModelDirectoryError: as `build`; tensors that are missing, surplus, ill-shaped or not finite.
        """

    def open(self, path: Path) -> tuple[ComposedModel, Weights]:
        """The model of a directory for training, as `herdkit.adapters.model_directory.open_model` gives it. Here it is
        read whole; layouts whose tensors can be read one by one do without.

        Raises:
            ModelDirectoryError: as `load`.
        """
        model = self.load(path, torch.float32)
        return model, HeldWeights.of(model.text)

    @abstractmethod
    def refusal(self, model: ComposedModel) -> str | None:
        """Why this layout cannot hold a model; None where it can."""

    @abstractmethod
    def save(self, model: ComposedModel, path: Path, *, max_shard_bytes: int, model_parallel: int) -> None:
        """Fills a new directory; options as in `herdkit.text.model_directory.save_text`."""


def layout_of(path: Path) -> tuple[ComposedLayout, Path] | None:
    """What reads the composed model of a directory of others, and where in it the files are; None for directories of
    ours and of language models alone.

    Raises:
        ModelDirectoryError: `path` is no model directory.
    """
    layout, place = find_layout(path)
    name = ""
    if layout == "huggingface":
        name = f"huggingface.{read_json(place / 'config.json').get('model_type')}"
    elif layout == "meta" and _cross_layers(read_json(place / PARAMS)) > 0:
        name = "meta.vision"
    points = list(entry_points(group=GROUP, name=name)) if name else []
    return (_made(points[0]), place) if points else None


def layout_for(layout: str, model: ComposedModel) -> ComposedLayout:
    """What writes a composed model in a layout, "huggingface" or "meta".

    Raises:
        ValueError: nothing does; says why not.
    """
    reasons = []
    for point in entry_points(group=GROUP):
        if point.name.partition(".")[0] == layout:
            made = _made(point)
            refusal = made.refusal(model)
            if refusal is None:
                return made
            reasons.append(f"{point.name}: {refusal}")
    has = f"layout {layout!r} has no place for this model with the adapters {', '.join(model.modalities)}"
    hint = "detach them, or save compose(model.text, model.tokenizer)"
    raise ValueError("; ".join([has, *reasons, hint]))


def _made(point: Any) -> ComposedLayout:
    found = point.load()
    if not (isinstance(found, type) and issubclass(found, ComposedLayout)):
        raise TypeError(f"the entry point {point.name!r} of {GROUP} is {found!r}, not a subclass of ComposedLayout")
    return found()


def _cross_layers(params: dict[str, Any]) -> int:
    count = params.get("vision_num_cross_attention_layers", -1)
    return count if isinstance(count, int) else -1
