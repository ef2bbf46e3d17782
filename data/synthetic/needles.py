"""Needles in haystacks: passwords hidden in prose, and the question for one of them at the end.

For long-context training a document hides several and asks for each; a test hides one at a known depth
(`herdkit.text.needle`).

    python -m herdkit.data.synthetic.needles runs/tiny-herd/data/text_haystacks

writes documents of 50 to 450 words of the English that a Python installation holds, in place of what is there.
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
    """A password of two words, of an owner of two words."""

    owner: str
    password: str

    @property
    def statement(self) -> str:
        return f"the password of {self.owner} is {self.password}."

    @property
    def question(self) -> str:
        """What comes before the password at the end of a haystack."""
        return f"what is the password of {self.owner}? the password of {self.owner} is"

    @property
    def answer(self) -> str:
        return f" {self.password}"


def needle(rng: Random) -> Needle:
    owner, password = (" ".join(rng.choices(spoken_vocabulary(), k=2)) for _ in range(2))
    return Needle(owner, password)


def haystacks(prose: Sequence[str], count: int, words: tuple[int, int], needles: int, seed: int) -> Iterator[str]:
    """Documents of prose with needles at random places, and at the end the question and answer for each of them.

    Args:
        prose: texts to hide them in, drawn at random.
        words: the shortest and the longest document, in words of prose; lengths between are as frequent by factor.
        needles: in a document.
    """
    for index in range(count):
        rng = Random(f"{seed}/{index}")
        shortest, longest = words
        length = round(shortest * (longest / shortest) ** rng.random())
        straw: list[str] = []
        while len(straw) < length:
            straw += rng.choice(prose).split()
        del straw[length:]
        hidden = [needle(rng) for _ in range(needles)]
        for one in hidden:
            straw.insert(rng.randint(0, len(straw)), one.statement)
        asked = [one.question + one.answer + "." for one in rng.sample(hidden, len(hidden))]
        yield " ".join([*straw, *asked])


def write_haystacks(
    out: str | Path, prose: Sequence[str], count: int, words: tuple[int, int], needles: int = 4, seed: int = 0
) -> None:
    """`haystacks` as shards, `<out>/000000.tar` and so on, in place of what is there."""
    with ShardWriter(Path(out) / "%06d.tar", existing="replace") as writer:
        for index, text in enumerate(haystacks(prose, count, words, needles, seed)):
            writer.write(f"{index:06d}", {"txt": text.encode()})


if __name__ == "__main__":
    training = [text for i, text in enumerate(english_documents(2_500_000)) if not is_held_out(i)]
    write_haystacks(sys.argv[1], training, 6000, (50, 450))
