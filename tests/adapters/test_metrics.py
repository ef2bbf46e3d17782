"""The rules of the benchmarks, by examples worked by hand from their papers."""

import pytest
from herdkit.adapters.metrics import (
    anls,
    exact_match,
    number_of,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_form,
)


def test_vqa_accuracy_is_the_mean_over_nine_of_ten():
    people = ["red"] * 3 + ["blue"] * 7
    # Leaving out one who said red: 2 of 3 in three of ten sets; else all 3.
    assert vqa_accuracy("Red.", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("the blue", people) == 1
    assert vqa_accuracy("green", people) == 0
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(9 * (1 / 3) / 10)
    assert vqa_accuracy("a red", ["red"]) == 1


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Two", "2"),
        ("The red, big one!", "red big 1"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("a.m.", "am"),
        ("dont know", "don't know"),
        # Of the official evaluation: one apostrophe is missing at a time, never two; a slip of its table; and words
        # that are others too, or begin with "I", are left alone.
        ("Oclock", "o'clock"),
        ("mightnt", "mightn't"),
        ("couldntve", "couldntve"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("yall'd've y'alld've y'all'dve", "y'all'd've y'all'd've y'all'd've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("well its shed im ive id lets were", "well its shed im ive id lets were"),
        # Whether a slash is glued is asked of the answer as it was written, before the semicolon went.
        ("a1;/b c/d", "a1 b c d"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("  NO\n", "no"),
    ],
)
def test_vqa_form(answer, form):
    assert vqa_form(answer) == form


def test_anls_is_zero_below_the_threshold():
    assert anls("Hello", ["hello"]) == 1
    # One letter of ten is wrong.
    assert anls("1234567890", ["123456789x"]) == pytest.approx(0.9)
    assert anls("abcd", ["abxy", "zzzz"]) == pytest.approx(0.5)
    assert anls("abcd", ["axyz"]) == 0
    assert anls("dollar", ["yen", "dollars"]) == pytest.approx(6 / 7)


def test_relaxed_accuracy():
    for given, right, expected in (
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("12%", "0.12", 1),
        ("$1,040", "1000", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Blue.", "blue", 1),
        ("light blue", "blue", 0),
        ("-10", "10", 0),
    ):
        assert relaxed_accuracy(given, [right]) == expected, (given, right)
    assert number_of("about 5") is None
    assert number_of("1e3") == 1000
    assert exact_match(" Red. ", ["blue", "red"]) == 1
    assert exact_match("red ball", ["red", "ball"]) == 0
