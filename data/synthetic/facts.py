"""Facts that a question states and a word answers: small arithmetic, order, opposites, colours, animals."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .words import NUMBERS, with_article

_OPPOSITES = """hot cold, big small, up down, left right, open closed, fast slow, day night, happy sad, old young,
good bad, light dark, wet dry, full empty, hard soft, high low, long short, early late, rich poor, loud quiet,
clean dirty, in out, near far, first last, black white, yes no"""
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_THING_COLOURS = {
    "grass": "green",
    "the sky": "blue",
    "the sun": "yellow",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "a lemon": "yellow",
    "a banana": "yellow",
    "a tomato": "red",
    "a carrot": "orange",
    "a frog": "green",
    "milk": "white",
    "the sea": "blue",
    "a pumpkin": "orange",
    "a plum": "purple",
    "the night": "black",
    "a cherry": "red",
    "a leaf": "green",
}
_SOUNDS = {
    "cow": "moo",
    "dog": "woof",
    "cat": "meow",
    "duck": "quack",
    "sheep": "baa",
    "lion": "roar",
    "bee": "buzz",
    "snake": "hiss",
    "pig": "oink",
    "owl": "hoot",
}
_YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "sheep": "lamb",
    "horse": "foal",
    "duck": "duckling",
    "lion": "cub",
    "hen": "chick",
    "pig": "piglet",
    "frog": "tadpole",
}
_LEGS = {
    "spider": "eight",
    "dog": "four",
    "cat": "four",
    "bird": "two",
    "bee": "six",
    "horse": "four",
    "snake": "zero",
    "ant": "six",
    "duck": "two",
    "fish": "zero",
}
_PLURALS = """mouse mice, foot feet, tooth teeth, child children, man men, woman women, goose geese, leaf leaves,
wolf wolves, sheep sheep, cat cats, box boxes, city cities, knife knives, star stars"""
_KINDS = {
    "apple": "fruit",
    "banana": "fruit",
    "cherry": "fruit",
    "dog": "animal",
    "horse": "animal",
    "lion": "animal",
    "monday": "day",
    "sunday": "day",
    "may": "month",
    "july": "month",
    "red": "colour",
    "blue": "colour",
    "seven": "number",
    "twelve": "number",
    "circle": "shape",
    "square": "shape",
    "carrot": "vegetable",
    "pumpkin": "vegetable",
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact with its ways of being asked.

    Args:
        kind: "sum", "opposite", ...
        phrasings: the question in lower-case words without punctuation; any two facts share none.
        answer: one lower-case word.
        choices: all answers of this kind.
    """

    kind: str
    phrasings: tuple[str, ...]
    answer: str
    choices: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether no training speech asks it: one fact in eight, by a hash. Text dialogues ask every fact."""
        return zlib.crc32(self.phrasings[0].encode()) % 8 == 0


@cache
def facts() -> tuple[Fact, ...]:
    """The whole table, several hundred facts, in a fixed order."""
    found: list[Fact] = []

    def add(kind: str, forms: tuple[str, ...], answers: Mapping[tuple[str, ...], str]) -> None:
        choices = tuple(sorted(set(answers.values())))
        for words, answer in answers.items():
            phrasings = tuple(form.format(*words) for form in forms)
            found.append(Fact(kind=kind, phrasings=phrasings, answer=answer, choices=choices))

    numbers = range(6)
    sums = {(NUMBERS[a], NUMBERS[b]): NUMBERS[a + b] for a in numbers for b in numbers}
    add("sum", ("what is {} plus {}", "how much is {} plus {}", "{} plus {}"), sums)
    differences = {(NUMBERS[a], NUMBERS[b]): NUMBERS[a - b] for a in numbers for b in range(a + 1)}
    add("difference", ("what is {} minus {}", "how much is {} minus {}", "{} minus {}"), differences)
    for kind, names in (("number", NUMBERS), ("day", _DAYS), ("month", _MONTHS)):
        cyclic = kind != "number"
        pairs = list(zip(names, names[1:] + names[:1] if cyclic else names[1:], strict=False))
        after = (f"what {kind} comes after {{}}", f"which {kind} comes after {{}}", "what comes after {}")
        before = (f"what {kind} comes before {{}}", f"which {kind} comes before {{}}", "what comes before {}")
        add(f"{kind} after", after, {(a,): b for a, b in pairs})
        add(f"{kind} before", before, {(b,): a for a, b in pairs})
    opposites = [tuple(pair.split()) for pair in _OPPOSITES.split(",")]
    both_ways = {(a,): b for a, b in opposites} | {(b,): a for a, b in opposites}
    add("opposite", ("what is the opposite of {}", "tell me the opposite of {}"), both_ways)
    coloured = {(thing,): colour for thing, colour in _THING_COLOURS.items()}
    add("colour of a thing", ("what colour is {}", "which colour is {}"), coloured)
    sounds = {(with_article(animal),): sound for animal, sound in _SOUNDS.items()}
    add("sound", ("what does {} say", "what sound does {} make"), sounds)
    young = {(animal,): name for animal, name in _YOUNG.items()}
    add("young", ("what is a young {} called", "what do you call a young {}"), young)
    legs = {(with_article(animal),): number for animal, number in _LEGS.items()}
    add("legs", ("how many legs does {} have", "count the legs of {}"), legs)
    plurals = [pair.split() for pair in _PLURALS.split(",")]
    add(
        "plural",
        ("what is the plural of {}", "tell me the plural of {}"),
        {(one,): more for one, more in plurals},
    )
    kinds = {(thing,): kind for thing, kind in _KINDS.items()}
    add("category", ("what kind of thing is {}", "what kind of word is {}"), kinds)
    return tuple(found)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the table, sorted."""
    return tuple(sorted({word for f in facts() for text in (*f.phrasings, f.answer) for word in text.split()}))
