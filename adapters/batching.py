"""Dialog samples with media to batches of the composed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.dialogs import Message, Part, dialog_sample
from ..data.packing import pack
from ..data.shards import Sample
from ..text.dialog import encode_dialog, encode_prompt
from ..text.rows import Document, TokenBatch, lay_out
from ..text.tokenizer import Tokenizer
from .contract import Adapter, ModalityBatch, Placements, Preparation, Visibility

Turns = Literal["conversation", "independent", "alternate"]
"""How a dialog of several turns becomes documents: as the one conversation that it is; as one document for each
turn, every one with the media that came before it (several questions about one image, which is encoded once);
or the one and the other in turn, by the sample's position in the run."""

FOREVER = torch.iinfo(torch.int64).max


@dataclass
class Port:
    """What a data loader needs to know of an adapter; small and picklable."""

    modality: str
    part: str
    placeholder: str
    prepare: Preparation
    visibility: Visibility

    @classmethod
    def of(cls, adapter: Adapter) -> Port:
        return cls(adapter.modality, adapter.part, adapter.placeholder, adapter.prepare, adapter.visibility)


@dataclass
class Batch:
    """Token rows and the inputs that stand in them; `inputs` is by modality, absent where there are none."""

    rows: TokenBatch
    inputs: dict[str, ModalityBatch] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        return self.rows.tokens

    @property
    def labels(self) -> Tensor:
        return self.rows.labels

    @property
    def documents(self) -> Tensor | None:
        return self.rows.documents

    def to(self, device) -> Batch:
        return Batch(self.rows.to(device), {name: batch.to(device) for name, batch in self.inputs.items()})


@dataclass
class MediaDocument(Document):
    """A document with (start, length, key of the input) for each input that stands in it, by modality."""

    placed: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)


class DialogCollator:
    """Samples to a `Batch`, as a picklable function for loader workers.

    Args:
        tokenizer: of the language model.
        ports: of the attached adapters.
        row_length: tokens of a row at most; a longer sample is an error that names it.
        turns: see `Turns`.
        packed: several samples share a row where they fit, kept apart by the document mask; else one row each.
        row_unit: rows are padded to a multiple of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ports: Iterable[Port] = (),
        *,
        row_length: int = 2048,
        turns: Turns = "conversation",
        packed: bool = False,
        row_unit: int = 1,
    ):
        self.tokenizer = tokenizer
        self.ports = {port.part: port for port in ports}
        self.row_length = row_length
        self.turns: Turns = turns
        self.packed = packed
        self.row_unit = row_unit

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> Batch:
        """The batch of (position in the run, sample) pairs.

        Raises:
            DialogError, MediaError, ValueError: a sample breaks the schema, its media do not decode, or it is
                too long; each names the sample.
        """
        encoder = DialogEncoder(self.tokenizer, self.ports)
        units: list[list[MediaDocument]] = []
        for position, sample in samples:
            where = f"{sample.shard}: sample {sample.key}"
            units.append([encoder.document(dialog, where) for dialog in self.dialogs(position, sample)])
            if (length := sum(len(d.tokens) for d in units[-1])) > self.row_length:
                raise ValueError(f"{where}: {length} tokens do not fit into rows of {self.row_length}")
        if self.packed:
            lengths = [sum(len(d.tokens) for d in unit) for unit in units]
            rows = [[d for i in row for d in units[i]] for row in pack(lengths, self.row_length)]
        else:
            rows = units
        longest = max(sum(len(d.tokens) for d in row) for row in rows)
        length = -(-longest // self.row_unit) * self.row_unit
        return Batch(lay_out(rows, self.tokenizer.pad_id, length), encoder.inputs(rows))

    def dialogs(self, position: int, sample: Sample) -> list[list[Message]]:
        """The dialogs that become documents of a sample at a position in the run; see `Turns`.

        Raises:
            DialogError: the sample breaks the schema.
        """
        messages = dialog_sample(sample, tuple(self.ports) or ("image", "video", "audio"))
        split = self.turns == "independent" or (self.turns == "alternate" and position % 2 == 1)
        return split_turns(messages) if split else [messages]

    def lengths(self, sample: Sample) -> list[int]:
        """The size of each input of a sample, for batches by length; see `herdkit.data.buckets`.

        Raises:
            DialogError, MediaError, ValueError: as for a batch, as far as it shows without decoding; an adapter does
                not know the sizes of its inputs.
        """
        media = [p for message in dialog_sample(sample, tuple(self.ports)) for p in message.media]
        sources = {(part.type, id(part.media)): part for part in media}  # each distinct one once, as in a batch
        return [self._size(part) for part in sources.values()]

    def _size(self, part: Part) -> int:
        prepare: Any = self.ports[part.type].prepare
        if not hasattr(prepare, "size"):
            raise TypeError(f"{type(prepare).__name__} has no method size; set data.bucket.by to bytes")
        return prepare.size(part.media)


class DialogEncoder:
    """Turns dialogs into documents and collects their media, each distinct one once."""

    def __init__(self, tokenizer: Tokenizer, ports: Mapping[str, Port]):
        self.tokenizer = tokenizer
        self.ports = ports
        self.items: dict[str, list[Any]] = {}
        self.keys: dict[tuple[str, int], int] = {}
        self.sources: list[Any] = []

    def document(self, messages: Sequence[Message], where: str, prompt: bool = False) -> MediaDocument:
        """One dialog in tokens; with `prompt`, followed by the opened header of the assistant's answer."""
        placed: dict[str, list[tuple[int, int, int]]] = {}

        def expand(part: Part) -> list[int]:
            port = self._port(part, where)
            key = self._key(port, part)
            length = port.prepare.positions(self.items[port.modality][key])
            return [self.tokenizer.special(port.placeholder)] * length

        encode = encode_prompt if prompt else encode_dialog
        encoded = encode(messages, self.tokenizer, expand)
        for start, length, part in encoded.placements:
            port = self._port(part, where)
            placed.setdefault(port.modality, []).append((start, length, self._key(port, part)))
        return MediaDocument(encoded.tokens, encoded.targets, placed)

    def inputs(self, rows: Sequence[Sequence[MediaDocument]]) -> dict[str, ModalityBatch]:
        """The media of the documents, prepared, and where they stand when laid out as these rows."""
        batches = {}
        for port in self.ports.values():
            if port.modality not in self.items:
                continue
            found: list[tuple[int, int, int, int, int]] = []
            for row, documents in enumerate(rows):
                at = 0
                for document in documents:
                    last = at + len(document.tokens)
                    final = last if document is not documents[-1] else FOREVER
                    placed = document.placed.get(port.modality, [])
                    for number, (start, length, key) in enumerate(placed):
                        end = final
                        if port.visibility == "latest":
                            end = end_of_sight(placed, number, at, final)
                        found.append((row, at + start, length, end, key))
                    at = last
            if found:
                columns = torch.tensor(found, dtype=torch.int64).unbind(1)
                row, start, length, end, key = (column.contiguous() for column in columns)
                tensors = port.prepare(self.items[port.modality])
                batches[port.modality] = ModalityBatch(tensors, Placements(row, start, length, end, key))
        return batches

    def _port(self, part: Part, where: str) -> Port:
        if part.type not in self.ports:
            has = sorted(self.ports) or "no adapters"
            raise ValueError(f"{where}: a part of type {part.type!r}, but the model takes {has}")
        return self.ports[part.type]

    def _key(self, port: Port, part: Part) -> int:
        """The number of the part's input among those of its modality; decodes it when first met."""
        identity = (port.modality, id(part.media))
        if identity not in self.keys:
            items = self.items.setdefault(port.modality, [])
            items.append(port.prepare.load(part.media))
            self.keys[identity] = len(items) - 1
            self.sources.append(part.media)  # kept alive, so that its id stays its own
        return self.keys[identity]


def end_of_sight(placed: Sequence[tuple[int, int, int]], number: int, at: int, final: int) -> int:
    """Where an input is last seen under the rule "latest": up to the next one of its modality that does not
    adjoin it; inputs that follow each other without a token between them share their end."""
    for (start, length, _), (following, _, _) in zip(placed[number:], placed[number + 1 :], strict=False):
        if following > start + length:
            return at + following
    return final


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """A conversation to one dialog for each answer: the system message, the media of all user turns so far,
    and the turn's own question and answer."""
    system = [m for m in messages if m.role == "system"]
    media: list[Part] = []
    dialogs = []
    question: Message | None = None
    for message in messages:
        if message.role == "user":
            question = Message("user", [*media, *message.parts])
            media = media + message.media
        elif message.role == "assistant" and question is not None:
            dialogs.append([*system, question, message])
    return dialogs
