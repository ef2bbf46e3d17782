"""Needles in haystacks: passwords hidden in prose, and the questions for them.

For long-context training a document hides many, and asks for each somewhere after it; a test hides one at a known depth
and asks at the end (`herdkit.text.needle`).

    python -m herdkit.data.synthetic.needles runs/tiny-herd/data/text_haystacks

writes documents of 40 to 350 words of the English that a Python installation holds, in place of what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..shards import ShardWriter
from .english import english_documents, is_held_out
from .texts import spoken_vocabulary


@dataclass(frozen=True)
class Needle:
    """A password of one word, of an owner of one word."""

    owner: str
    password: str

    @property
    def statement(self) -> str:
        return f"the password of {self.owner} is {self.password}."

    @property
    def question(self) -> str:
        """What comes before the password where it is asked for."""
        return f"what is the password of {self.owner}? the password of {self.owner} is"

    @property
    def answer(self) -> str:
        return f" {self.password}"


def needles(rng: Random, count: int) -> list[Needle]:
    """
    Raises:
        ValueError: more needles than there are owners.
    """
    words = spoken_vocabulary()
    if count > len(words):
        raise ValueError(f"{count} needles, but there are only {len(words)} words for their owners")
    return [Needle(owner, rng.choice(words)) for owner in rng.sample(words, count)]


def haystacks(prose: Sequence[str], count: int, words: tuple[int, int], spacing: int, seed: int) -> Iterator[str]:
    """Documents of prose with needles at random places, and the question and answer for each at a place after it: so
    a row that holds a part of a document still holds needles and their questions.

    Args:
        prose: texts to hide them in, drawn at random.
        words: the shortest and the longest document, in words of prose; lengths between are as frequent by factor.
        spacing: words of prose for each needle; every document has one at least.
    """
    for index in range(count):
        rng = Random(f"{seed}/{index}")
        shortest, longest = words
        length = round(shortest * (longest / shortest) ** rng.random())
        straw: list[str] = []
        while len(straw) < length:
            straw += rng.choice(prose).split()
        del straw[length:]
        before: list[list[str]] = [[] for _ in range(length + 1)]
        for one in needles(rng, max(1, length // spacing)):
            hidden, asked = sorted(rng.choices(range(length + 1), k=2))
            before[hidden].append(one.statement)
            before[asked].append(one.question + one.answer + ".")
        parts = [part for at, sentences in enumerate(before) for part in [*sentences, *straw[at : at + 1]]]
        yield " ".join(parts)


def write_haystacks(
    out: str | Path, prose: Sequence[str], count: int, words: tuple[int, int], spacing: int = 30, seed: int = 0
) -> None:
    """`haystacks` as shards, `<out>/000000.tar` and so on, in place of what is there."""
    with ShardWriter(Path(out) / "%06d.tar", existing="replace") as writer:
        for index, text in enumerate(haystacks(prose, count, words, spacing, seed)):
            writer.write(f"{index:06d}", {"txt": text.encode()})


if __name__ == "__main__":
    training = [text for i, text in enumerate(english_documents(2_500_000)) if not is_held_out(i)]
    write_haystacks(sys.argv[1], training, 8000, (40, 350))
