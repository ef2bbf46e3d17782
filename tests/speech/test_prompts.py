import pytest
from herdkit.data.dialogs import parse_dialog
from herdkit.data.synthetic.texts import COPY_PROMPT
from herdkit.speech.prompts import (
    BY_CHARACTERS,
    LANGUAGES,
    transcription_dialog,
    transcription_prompt,
    translation_dialog,
    translation_prompt,
)


def test_the_papers_34_languages():
    assert len(set(LANGUAGES)) == 34
    assert list(LANGUAGES) == sorted(LANGUAGES)
    assert set(LANGUAGES) > BY_CHARACTERS


def test_the_papers_prompts():
    assert transcription_prompt("English") == "Repeat after me in English:" == COPY_PROMPT
    assert translation_prompt("German") == "Translate the following sentence into German:"
    with pytest.raises(ValueError, match="'german'; did you mean 'German'"):
        translation_prompt("german")
    with pytest.raises(ValueError, match="no language 'Klingonese'"):
        transcription_prompt("Klingonese")


def test_dialogs_keep_the_schema():
    for messages in (
        transcription_dialog("flac", "Thai", "text"),
        translation_dialog("wav", "English", "text"),
    ):
        parsed = parse_dialog(messages, "here")
        assert parsed[-1].role == "assistant"
        assert [part.type for part in parsed[-2].parts] == ["audio"]
    assert [m["role"] for m in transcription_dialog("flac", "Thai")] == ["system", "user"]
