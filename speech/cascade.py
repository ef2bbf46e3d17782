"""The cascade: speech is written down first, and the language model then answers the words. It is the baseline of every
spoken dialogue, and the stronger one of most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.compose import ComposedModel
from ..data.dialogs import Message, Part, parse_dialog
from ..data.media import MediaError
from .transcribe import Transcriber, TranscriptionConfig


class Cascade:
    """Writes the recordings of dialogs down.

    Args:
        model: with a speech adapter; the transcripts are its own.
        config: how it transcribes.
    """

    def __init__(self, model: ComposedModel, config: TranscriptionConfig | None = None):
        self.transcriber = Transcriber(model, config)

    def written(self, messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
        """The dialog with a text part in place of every recording.

        Raises:
            DialogError: the messages break the schema.
            MediaError: a recording cannot be read, or nobody speaks in it.
        """
        parsed = parse_dialog(list(messages), "chat")  # type: ignore[arg-type]
        spoken = [part for message in parsed for part in message.parts if part.type == "audio"]
        words = {id(part): text for part, text in zip(spoken, self._texts(spoken), strict=True)}
        for message in parsed:
            message.parts = [
                Part("text", text=words[id(part)]) if part.type == "audio" else part for part in message.parts
            ]
        return parsed

    def _texts(self, spoken: Sequence[Part]) -> list[str]:
        texts = []
        for part, found in zip(spoken, self.transcriber([part.media for part in spoken]), strict=True):
            if found.status != "ok":
                name = part.media if isinstance(part.media, str) else "audio"
                reason = (found.error or found.status).removeprefix(f"{name}: ")
                raise MediaError(name, reason)
            texts.append(found.text)
        return texts
