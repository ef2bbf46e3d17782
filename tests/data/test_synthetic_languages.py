"""Sentences of four languages: the same things are said, sets are apart, and voices that are held out are."""

import io
from itertools import product
from random import Random

import pytest
import soundfile
from herdkit.data import ShardReader
from herdkit.data.synthetic.languages import DIRECTIONS, LANGUAGES, Sentence, draw, spoken, written
from herdkit.data.synthetic.sets import build_languages
from herdkit.speech.prompts import transcription_prompt, translation_prompt

ALL = [Sentence(*numbers) for numbers in product(range(8), range(6), range(6), range(6))]


def test_sentences_agree_in_gender_and_follow_their_languages_order():
    assert [Sentence(1, 0, 0, 0).text(language) for language in LANGUAGES] == [
        "the red cat sleeps today",
        "die rote katze schläft heute",
        "la gata roja duerme hoy",
        "la chatte rouge dort aujourd'hui",
    ]
    assert Sentence(2, 1, 3, 3).text("German") == "das schwarze pferd läuft oft"
    assert Sentence(3, 2, 4, 5).text("French") == "la vache blanche boit encore"
    for language in LANGUAGES:
        assert len({sentence.text(language) for sentence in ALL}) == len(ALL) == 1728


def test_a_tenth_is_held_out_from_all_texts():
    assert sum(sentence.held_out for sentence in ALL) == pytest.approx(173, abs=30)
    rng = Random(0)
    assert all(draw(rng, held_out).held_out == held_out for held_out in (True, False) for _ in range(50))
    held_out = {sentence.text(language) for sentence in ALL if sentence.held_out for language in LANGUAGES}
    for _, _, members in written(["a"], 0, 0, 300):
        said = [message["content"].replace(" .", "") for message in members["json"]["messages"][1:]]
        assert not held_out.intersection(said)


def test_dialogs_have_the_prompts_of_speech():
    prompts = {members["json"]["messages"][0]["content"] for _, _, members in written(["a"], 0, 0, 400)}
    assert prompts == {
        *map(transcription_prompt, LANGUAGES),
        *(translation_prompt(target) for _, target in DIRECTIONS),
    }


def test_voices_of_the_test_set_are_in_no_other():
    voices = {}
    for split in ("train", "new"):
        made = spoken(["a"], 0, 0, 24, split=split)
        voices[split] = {members["json"]["voice"] for _, _, members in made}
        for _, _, members in made:
            samples, rate = soundfile.read(io.BytesIO(members["flac"]))
            assert rate == 16_000
            assert 1 <= len(samples) / rate < 6
            content = members["json"]
            assert content["translation"][content["language"]] == members["txt"]
    assert voices["new"] == {f"{name}+m3" for name in ("en-us", "de", "es", "fr")}
    assert not voices["train"] & voices["new"]
    assert len({voice.split("+")[0] for voice in voices["train"]}) == 4


def test_sets_are_built_once_and_alike(tmp_path):
    counts = {"written": 20, "spoken_new": 4}
    for folder in ("one", "two"):
        build_languages(tmp_path / folder, counts, seed=1, workers=0)
    one, two = (ShardReader(str(tmp_path / folder / "spoken_new" / "*.tar")) for folder in ("one", "two"))
    assert [sample.members for sample in one] == [sample.members for sample in two]
    assert [sample.json()["language"] for sample in one] == list(LANGUAGES)
    assert "seconds" not in build_languages(tmp_path / "one", counts, seed=1, workers=0)["written"]
    with pytest.raises(ValueError, match="was built with seed 1, now 2"):
        build_languages(tmp_path / "one", counts, seed=2, workers=0)
