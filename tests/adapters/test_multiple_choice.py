"""What answers to questions of multiple choice mean, as the public parsers of MMMU and MMBench read them where these do
not guess."""

import pytest
from herdkit.adapters.multiple_choice import chosen, label, listed, multiple_choice, right_choice

CHOICES = ["red", "dark red", "blue", "a big star"]

CLEAR = {
    "A": [
        "A", "a", "(A)", "A.", "Answer: A", "answer: A. red", "the answer is a.", "The answer is A because it is",
        "I would say (A)", "I think it is red", "a) red", "A: the one on the left", "Red.",
    ],
    "B": [
        "B", "b.", "[b]", "**B**", "Answer:\nB", "Answer: b", "Answer: (B) dark red", "Option B", "dark   RED",
        "It is dark red.", "B. It is dark red, since it is not blue.", "B, not blue", "The answer is not C, it is B",
        "The correct answer is option B", "It must be B.", "Answer: B since it isn't blue",
    ],
    "C": [
        "(c)", "C) blue", "blue", "**Answer:** C", "The answer is C", "\\boxed{C}", "not red but blue", "blue, blue",
        "Surely C of all of them", "The answer is (C), the blue one", "A thing that is blue", "`C`",
    ],
    "D": ["**D**", "A big star", "The answer is a big star", "The answer is: **(D)**", "Answer: A big star"],
}  # fmt: skip

UNCLEAR = [
    "", "E", "I do not know", "A thing", "a dog", "The answer is a dog", "Answer: A dog", "A or B", "Both A and B",
    "A, B", "The answer is A or B", "Answer: A/B", "(A) or (B)", "Answer: B or answer: C", "red or blue",
    "red or dark red", "B) red", "I choose C, dark red", "It is not B", "It isn't blue", "Not A, B or C", "blue-green",
    "C++", "option b", "bluest", "I like D.C.",
]  # fmt: skip


@pytest.mark.parametrize(("letter", "given"), [(letter, given) for letter, all in CLEAR.items() for given in all])
def test_what_an_answer_means(letter, given):
    assert chosen(given, CHOICES) == "ABCD".index(letter)


@pytest.mark.parametrize("given", UNCLEAR)
def test_what_cannot_be_told_is_not_guessed(given):
    assert chosen(given, CHOICES) is None


def test_numbers_are_whole():
    numbers = ["1", "1.5", "10", "-1", "5%", "5"]
    said = ["it is 1.", "it is 1.5", "it is 10", "it is -1", "about 5%", "5", "1,000 of them", "0.1"]
    assert [chosen(given, numbers) for given in said] == [0, 1, 2, 3, 4, 5, None, None]


def test_choices_that_cannot_be_told_apart():
    assert chosen("red", ["red", "Red."]) is None
    assert chosen("B", ["red", "Red."]) == 1
    assert chosen("red", []) is None


def test_letters_go_on_after_z():
    assert [label(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    many = [f"word{i}" for i in range(40)]
    assert listed(many).endswith("(AM) word38 (AN) word39")
    for given, number in (("AB", 27), ("(an)", 39), ("I think it is J", 9), ("I", 8), ("word12", 12), ("word1", 1)):
        assert chosen(given, many) == number, given
    assert chosen("Answer: I think so", many) is None
    assert right_choice("AN", many) == 39


def test_multiple_choice_is_given_by_letter_or_text():
    assert multiple_choice("the answer is B", ["dark red"], CHOICES) == 1
    assert multiple_choice("(B)", ["B"], CHOICES) == 1
    assert multiple_choice("C", ["B"], CHOICES) == 0
    assert multiple_choice("no idea", ["B"], CHOICES) == 0
    assert right_choice("(d)", CHOICES) == 3
    with pytest.raises(ValueError, match="'green' is none of the choices"):
        right_choice("green", CHOICES)
