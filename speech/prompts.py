"""What a system prompt makes the language model do with speech (section 8.2.1 of "The Llama 3 Herd of Models", arXiv
2407.21783): write it down, translate it, or, without one, answer it. The language that is spoken is never named."""

from __future__ import annotations

import difflib
from typing import Any

LANGUAGES = (
    *("Arabic", "Bengali", "Chinese", "Czech", "Dutch", "English", "Finnish", "French", "German", "Greek"),
    *("Gujarati", "Hindi", "Hungarian", "Indonesian", "Italian", "Japanese", "Kannada", "Korean", "Malayalam"),
    *("Marathi", "Persian", "Polish", "Portuguese", "Romanian", "Russian", "Spanish", "Swahili", "Swedish"),
    *("Tamil", "Telugu", "Thai", "Turkish", "Urdu", "Vietnamese"),
)
"""The 34 that the paper's model was trained on."""

BY_CHARACTERS = frozenset({"Chinese", "Japanese", "Korean", "Thai"})
"""Languages whose transcripts the paper scores by characters, not by words (section 8.4)."""


def transcription_prompt(language: str) -> str:
    """The system prompt for a transcript in one of `LANGUAGES`; ValueError for another."""
    return f"Repeat after me in {_known(language)}:"


def translation_prompt(language: str) -> str:
    """The system prompt for a translation into one of `LANGUAGES`; ValueError for another."""
    return f"Translate the following sentence into {_known(language)}:"


def transcription_dialog(audio: Any, language: str, text: str | None = None) -> list[dict[str, Any]]:
    """The messages of a dialog that transcribes.

    Args:
        audio: as in `herdkit.data.dialogs`: the extension of a member of the same sample, or in a chat what holds the
            recording.
        language: that is spoken, and written.
        text: the right answer, in a dialog to train on.

    Raises:
        ValueError: a language that is none of `LANGUAGES`.
    """
    return _dialog(transcription_prompt(language), audio, text)


def translation_dialog(audio: Any, language: str, text: str | None = None) -> list[dict[str, Any]]:
    """The messages of a dialog that translates into `language`; otherwise as `transcription_dialog`."""
    return _dialog(translation_prompt(language), audio, text)


def _dialog(prompt: str, audio: Any, text: str | None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": prompt},
        {"role": "user", "content": [{"type": "audio", "audio": audio}]},
    ]
    return messages if text is None else [*messages, {"role": "assistant", "content": text}]


def _known(language: str) -> str:
    if language not in LANGUAGES:
        near = difflib.get_close_matches(language.capitalize(), LANGUAGES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(LANGUAGES)}"
        raise ValueError(f"no language {language!r}; {hint}")
    return language
