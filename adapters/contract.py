"""How a sense joins the language model: the one contract of every adapter.

An adapter turns inputs of its modality into a `Contribution`, by either or both of two routes:

* **soft tokens** stand in the token sequence in place of the input's placeholder tokens (speech, section
  8.2.1 of "The Llama 3 Herd of Models", arXiv 2407.21783; projectors);
* **memory** is what the adapter's own interleaved layers attend to around the text layers (image and video,
  section 7.2).

The language model knows neither: `compose` places the soft tokens, runs the interleaved layers and guards who
may see what. Letters in shapes: B rows of a batch, T positions of a row, D width of the language model,
N distinct inputs of a batch, S soft tokens of an input, M memory entries of an input, P placements, K inputs
of a row, H heads, Dh width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..text.model import TransformerConfig
from ..train.portions import Source

Visibility = Literal["latest", "all"]
"""Which inputs a text position sees in memory: those of the latest run of placeholders before it (the rule of
the released Llama 3.2 Vision: an image counts until the next one begins, adjacent ones count together), or all
inputs before it in its document."""


@dataclass
class InputLoss:
    """A loss that an adapter finds by itself, such as of its encoder's frames against what is said: it is added to the
    one that the model is trained with.

    Args:
        values: (N,) float32 or float64, the loss of each input, summed over its targets.
        counts: (N,) int64, how many targets each has; the log has the mean over them.
        weight: of the sum over inputs, beside a next-token loss that is summed over tokens.
    """

    values: Tensor
    counts: Tensor
    weight: float = 1.0


@dataclass
class Contribution:
    """What an adapter gives for N inputs, as plain tensors, so that it can be cached, moved and split.

    Args:
        soft_tokens: (N, S, D), rows that replace the placeholder positions of each input, padded on the right;
            how many of them count is the input's number of positions. None where the adapter has none: the
            placeholders then keep the language model's own embedding.
        memory: (N, M, width), what the interleaved layers attend to, or None.
        memory_mask: (N, M) bool, True where the entry is real; None means that all are.
        losses: by their name in the log. What they need beside the inputs, a `DialogCollator` puts among the tensors
            of the inputs; without it there are none.
    """

    soft_tokens: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    losses: Mapping[str, InputLoss] = field(default_factory=dict)


@dataclass
class Placements:
    """Where the inputs of one modality stand in a batch of token rows. One entry for each appearance, so that
    an input shown several times in a batch (several questions about one image) is encoded once.

    Args:
        row: (P,) int64, the row of the batch.
        start: (P,) int64, the first position of its placeholders in the row.
        length: (P,) int64, the number of its placeholders.
        end: (P,) int64, the first position at or after `start` that no longer sees its memory; a position t
            sees the input when start <= t < end.
        input: (P,) int64, which of the N inputs it shows.
    """

    row: Tensor
    start: Tensor
    length: Tensor
    end: Tensor
    input: Tensor

    def to(self, device) -> Placements:
        return Placements(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass
class ModalityBatch:
    """The inputs of one modality in a batch.

    Args:
        tensors: what `Preparation.__call__` made of the N distinct inputs.
        placements: where they stand in the token rows.
    """

    tensors: dict[str, Tensor]
    placements: Placements

    def to(self, device) -> ModalityBatch:
        return ModalityBatch({k: v.to(device) for k, v in self.tensors.items()}, self.placements.to(device))


@runtime_checkable
class Preparation(Protocol):
    """Raw inputs to tensors. Small and picklable, holds no parameters: it runs in loader workers.

    One that has a further method `size(source) -> int` can be trained in batches by length: how much the encoder will
    see of a raw input (mel frames, tiles), found without decoding it where that can be.
    """

    def load(self, source: Any) -> Any:
        """Decodes a path, bytes, or an object that is already decoded into one raw input.

        Raises:
            herdkit.data.media.MediaError: the source is missing, empty, truncated or of another kind.
        """
        ...

    def positions(self, item: Any) -> int:
        """How many placeholder positions this raw input takes in the token row (at least 1)."""
        ...

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Batches N >= 1 raw inputs, padded to one shape; every tensor's first dimension is N."""
        ...


class InterleavedLayer(nn.Module, ABC):
    """A layer that runs just before a text layer and attends to memory.

    Keys and values are computed once for each input and kept for decoding. `compose` hands the layer, for
    each row, those of the inputs that stand in the row, and drops its result at positions that see nothing.

    Attributes:
        source: of a layer on the meta device, where its weights are to be read; see `herdkit.adapters.deferred`.
    """

    source: Source | None = None

    @abstractmethod
    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M, width) to keys and values, each (N, H_kv, M, Dh)."""

    @abstractmethod
    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The new hidden state, (B, T, D).

        Args:
            hidden: (B, T, D).
            keys: (B, H_kv, K * M, Dh); values: likewise.
            mask: (B, 1, T, K * M) bool, True where the position sees the entry. A position that sees
                nothing has True everywhere, so that its softmax is finite; its result is not used.
        """


class Adapter(nn.Module, ABC):
    """Encoder and bridge of one modality. Built as `Adapter(config, text)` from its own config dataclass and
    the config of the language model that it joins; registered by name through the entry-point group
    `herdkit.adapters`.

    Attributes:
        kind: the name under which the class is registered, written to `config.json`; the modality by default.
        modality: "image", "video", "speech" or a user's own; a Python identifier, the prefix of the adapter's
            parameter names in the composed model and the name of its checkpoint file.
        part: the `type` of a dialog part that carries this modality ("image", "video", "audio").
        placeholder: the special token that marks where an input stands in the text.
        visibility: see `Visibility`.
        order: among the interleaved layers around one text layer, smaller runs first.
        requires: what `forward` takes as keyword arguments: modalities, for their adapters (video encodes its frames
            with the image adapter's encoder), "text", for the language model, or "embeddings", for the module of its
            token embeddings, whose weight `herdkit.train.sharding.borrow_weight` gives.
        config: the dataclass it was built from; written to and read from `config.json`.
        prepare: its `Preparation`.
    """

    kind: ClassVar[str]
    modality: ClassVar[str]
    part: ClassVar[str]
    placeholder: ClassVar[str]
    config_class: ClassVar[type]
    visibility: ClassVar[Visibility] = "latest"
    order: ClassVar[int] = 0
    requires: tuple[str, ...] = ()

    config: Any
    prepare: Preparation

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "kind" not in vars(cls) and "modality" in vars(cls):
            cls.kind = cls.modality

    @abstractmethod
    def __init__(self, config: Any, text: TransformerConfig):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor], **required: nn.Module) -> Contribution:
        """Encodes N inputs.

        Args:
            batch: what `prepare` made of them.
            required: the parts of the model that `requires` names.
        """

    def shared(self, group: ProcessGroup, **required: nn.Module) -> AbstractContextManager[None] | None:
        """Meanwhile `forward`, called on all processes of a group with the same inputs, runs the encoder for a part of
        the tokens of every input and gives each process the whole contribution; of the gradient of a weight each
        process has its own part, whose sum it is. None, the default: it cannot, and inputs are shared out whole."""
        return None

    def interleaved(self) -> Mapping[int, InterleavedLayer]:
        """The layers to run just before text layer i, by i; empty for adapters of soft tokens alone. They
        must be registered sub-modules of the adapter."""
        return {}
