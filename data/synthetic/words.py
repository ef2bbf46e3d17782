"""The words that made pictures, clips and questions share, and the attribute pairs that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 40),
    "green": (30, 155, 60),
    "blue": (40, 90, 225),
    "yellow": (246, 214, 20),
    "purple": (150, 50, 185),
    "orange": (250, 128, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("big", "small")
WRITTEN_WORDS = ("go", "bus", "stop", "milk", "open", "exit", "hello", "apple")
PLACES = (
    ("top left", "top middle", "top right"),
    ("middle left", "middle", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)
PLACE_NAMES = tuple(name for row in PLACES for name in row)
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    "twenty",
)

# Chosen once, before any model was trained: one pair in six, each colour and each shape exactly once, so that
# both attributes of every pair are seen in five other pairs. No training picture or clip shows one of these,
# and no training question on a picture or clip names one; texts without pictures do.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "heart"),
        ("blue", "triangle"),
        ("yellow", "circle"),
        ("purple", "square"),
        ("orange", "cross"),
    }
)
ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAINING_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
PAIR_NAMES = tuple(f"{colour} {shape}" for colour, shape in ALL_PAIRS)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with one right answer.

    Args:
        kind: what is asked for ("colour", "count", ...).
        question: lower-case words without punctuation, as it would be spoken.
        answer: lower-case words, mostly one to four.
        choices: the possible answers of this kind, from which 1 / len(choices) is the level of chance.
        form: the sentence that holds the answer at its end. It says first what was asked about, so that a small
            language model has it before its eyes when it looks the answer up.
    """

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...]
    form: str = "{}"

    @property
    def sentence(self) -> str:
        """The whole right answer."""
        return self.form.format(self.answer)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The whole answers among which it is."""
        return tuple(map(self.form.format, self.choices))


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def listed(phrases: Sequence[str]) -> str:
    """["a", "b", "c"] to "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def typed(question: str, rng: Random) -> str:
    """As a person types it: half of the time with a question mark."""
    return question + rng.choice(("", "?"))
