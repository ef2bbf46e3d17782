"""Stored samples as the tokens that a model is trained on, for looking at data before training on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.dialogs import MEDIA_TYPES, Part, dialog_sample
from ..data.drafts import Problem
from ..data.shard_survey import Spread
from ..data.shards import Sample
from ..text.row_stage import document_encoder
from ..text.rows import Document
from ..text.tokenizer import Tokenizer
from .batching import DialogEncoder, Port
from .model_directory import load_ports


@dataclass
class SampleTokens(Document):
    """A sample in tokens.

    Args:
        kind: "dialog", in the chat format, or "text".
        media: first placeholder, number of placeholders and part for each medium, in order.
    """

    kind: str
    media: list[tuple[int, int, Part]] = field(default_factory=list)


class SampleEncoder:
    """Makes of samples what the collators make of them for training: of a sample with a dialog (`messages` in its
    member `json`) its chat, of any other with a `txt` its text as a document of pre-training.

    Args:
        source: a model directory, for its tokenizer and the numbers of positions that its adapters give to media;
            or a `tokenizer.json` or `tokenizer.model`.

    Attributes:
        stand_ins: the types of media that no adapter takes; each counts as one token.

    Raises:
        ModelDirectoryError, ValueError, FileNotFoundError: it cannot be read.
    """

    def __init__(self, source: str | os.PathLike):
        path = Path(source)
        self.tokenizer, ports = (Tokenizer.load(path), []) if path.is_file() else load_ports(path)
        self.ports = {port.part: port for port in ports}
        self.stand_ins = [part for part in MEDIA_TYPES if part not in self.ports]
        for part in self.stand_ins:
            self.ports[part] = Port(part, part, f"<|{part}|>", _StandIn(), "latest")
        self._document = document_encoder(self.tokenizer)

    def __call__(self, sample: Sample) -> SampleTokens | None:
        """The sample in tokens, or None where it has neither a dialog nor a text.

        Raises:
            ValueError: see `herdkit.adapters.DialogCollator`; names the sample.
        """
        if has_dialog(sample):
            messages = dialog_sample(sample, tuple(self.ports))
            encoder = DialogEncoder(self.tokenizer, self.ports)
            document = encoder.document(messages, f"{sample.shard}: sample {sample.key}")
            places = sorted((start, length) for placed in document.placed.values() for start, length, _ in placed)
            parts = [part for message in messages for part in message.media]
            media = [(*place, part) for place, part in zip(places, parts, strict=True)]
            return SampleTokens(document.tokens, document.targets, "dialog", media)
        if "txt" in sample.members:
            (tokens,) = self._document([sample])
            return SampleTokens(tokens, [False] + [True] * (len(tokens) - 1), "text")
        return None


class _StandIn:
    """Media of a type that nothing is attached for."""

    def load(self, source: Any) -> Any:
        return source

    def positions(self, item: Any) -> int:
        return 1

    def __call__(self, items: Any) -> Any:
        raise NotImplementedError


@dataclass
class TokenLengths:
    """Of samples of one kind, see `SampleTokens`.

    Args:
        lengths: of the samples, in tokens.
        in_loss: the tokens of all of them that count in the loss.
        stand_ins: types of media among them that no adapter takes.
    """

    lengths: Spread
    in_loss: int
    stand_ins: list[str]


def token_lengths(
    samples: Iterable[Sample], encode: SampleEncoder, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, TokenLengths], list[Problem]]:
    """The lengths of samples in tokens by kind, and those that cannot be encoded.

    Args:
        progress: called with the number of samples done.
    """
    lengths: dict[str, list[int]] = {}
    in_loss: Counter[str] = Counter()
    met: dict[str, set[str]] = {}
    problems = []
    for done, sample in enumerate(samples, start=1):
        try:
            found = encode(sample)
        except ValueError as error:
            problems.append(Problem(sample.shard, sample.key, reason_in(error, sample)))
            found = None
        if found is not None:
            lengths.setdefault(found.kind, []).append(len(found.tokens))
            in_loss[found.kind] += sum(found.targets)
            met.setdefault(found.kind, set()).update(part.type for _, _, part in found.media)
        if progress is not None:
            progress(done)
    kinds = {
        kind: TokenLengths(Spread.of(lengths[kind]), in_loss[kind], sorted(met[kind].intersection(encode.stand_ins)))
        for kind in sorted(lengths)
    }
    return kinds, problems


def has_dialog(sample: Sample) -> bool:
    """Whether the sample has a member `json` with `messages`.

    Raises:
        ShardError: that member is not JSON.
    """
    content = sample.json() if "json" in sample.members else None
    return isinstance(content, dict) and "messages" in content


def reason_in(error: ValueError, sample: Sample) -> str:
    """The message of an error without the place, which stands beside it."""
    return str(error).removeprefix(f"{sample.shard}: sample {sample.key}").removeprefix(": ").removeprefix(".")
