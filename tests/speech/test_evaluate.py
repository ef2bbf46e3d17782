import jiwer
import numpy as np
import pytest
import sacrebleu
from herdkit.speech.evaluate import (
    Errors,
    bleu,
    by_group,
    character_errors,
    errors_in,
    hallucination,
    length_group,
    made_silence,
    normalise,
    word_errors,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

SAID = ["Go left, now!", "the red star (a big one) is here", "it's 3.5 km", "Übung macht den Meister", "¿Qué tal?"]
HEARD = ["go left", "the red star was here", "its 3 5 km", "übung macht den meister", "que tal"]


@pytest.mark.parametrize("text", [*SAID, "[noise] a <b> c", "ﬁne  “quotes” ... dash", "größe ﬃ Ⅷ", "日本語。テスト"])
def test_texts_are_compared_as_whisper_compares_them(text):
    assert normalise(text) == " ".join(BasicTextNormalizer()(text).split())


def test_marks_that_are_part_of_a_script_stay():
    assert normalise("ภาษาไทยที่นี่") == "ภาษาไทยที่นี่"
    assert normalise("हिन्दी, भाषा।") == "हिन्दी भाषा"
    assert normalise("20 ℃, № 5") == "20 c no 5"
    assert normalise(" Plain,  Text ", "plain") == "plain, text"


def test_word_errors_are_jiwers():
    found = word_errors(SAID, HEARD)
    clean = BasicTextNormalizer()
    said, heard = ([" ".join(clean(text).split()) for text in texts] for texts in (SAID, HEARD))
    assert found.rate == pytest.approx(jiwer.wer(said, heard))
    assert found.units == [len(text.split()) for text in said]
    assert found.errors[3] == 0


def test_character_errors_leave_white_space_out():
    assert character_errors(["ab cd"], ["abcd"]).rate == 0
    found = character_errors(SAID, HEARD)
    expected = jiwer.cer(*[[normalise(t).replace(" ", "") for t in texts] for texts in (SAID, HEARD)])
    assert found.rate == pytest.approx(expected)
    assert errors_in("Thai", ["ก ข"], ["กข"]).units == [2]
    assert errors_in("German", ["a b"], ["a c"]).rate == 0.5


def test_words_for_an_empty_reference_are_insertions():
    found = word_errors(["", "go left"], ["thank you", "go left"])
    assert (found.errors, found.units) == ([2, 0], [0, 2])
    with pytest.raises(ValueError, match="hold no words"):
        word_errors(["", "..."], ["a", ""])
    with pytest.raises(ValueError, match="2 references, but 1"):
        word_errors(["a", "b"], ["a"])


def test_the_interval_covers_the_true_rate_as_often_as_it_says():
    generator, covered = np.random.default_rng(1), 0
    for _ in range(60):
        units = generator.integers(1, 20, 100)
        low, high = Errors(list(generator.binomial(units, 0.2)), list(units)).interval
        covered += low <= 0.2 <= high
    assert 51 <= covered <= 60
    one = Errors([1, 0, 2], [5, 5, 5])
    assert one.interval == one.interval


def test_bleu_is_sacrebleus():
    references, given = (
        ["the cat sat on the mat", "a dog ran to the park"],
        ["the cat sat on a mat", "a dog ran to park"],
    )
    found = bleu(references, given)
    assert found.score == pytest.approx(sacrebleu.corpus_bleu(given, [references]).score)
    assert found.interval[0] < found.interval[1]
    assert "tok:13a" in found.signature
    assert "tok:zh" in bleu(["我们走吧"], ["我们走吧"], "Chinese").signature
    assert "tok:char" in bleu(["すぐに行きます"], ["すぐに行きます"], "Japanese").signature
    with pytest.raises(ValueError, match="2 references, and 1"):
        bleu(["a", "b"], ["a"])


def test_tables_have_a_line_for_each_group_and_one_for_all():
    said, heard = ["go left", "ab", "", "stop"], ["go right", "ab", "what", "stop"]
    rows = by_group(["b", "a", "b", "b"], said, heard, ["English", "Thai", "English", "English"])
    assert [(row.name, row.count) for row in rows] == [("a", 1), ("b", 2), ("all", 3)]
    assert [round(row.rate, 3) for row in rows] == [0.0, 0.333, 0.2]
    assert by_group(["a"], [""], ["x"], ["English"]) == []
    names = [length_group(seconds) for seconds in (1, 2, 7, 12, 29, 59, 60, 500)]
    assert names == ["00-02 s", "02-05 s", "05-10 s", "10-20 s", "20-30 s", "30-60 s", "over 60 s", "over 60 s"]


def test_hallucination_counts_words_where_nobody_speaks():
    assert hallucination(["", " . ", "thank you", "you"]) == hallucination(["", "", "a b", "c"])
    found = hallucination(["", "thank you", "you"])
    assert (found.count, found.spoken, found.words) == (3, 2, 3)
    made = made_silence(16_000, 2.0, 3)
    assert {"digital silence", "white noise", "pink noise"} <= set(made)
    for rows in made.values():
        for one in rows:
            assert one.shape == (32_000,)
            assert one.dtype == np.float32
            assert np.abs(one).max() <= 1
