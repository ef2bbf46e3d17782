"""Answers of a composed model to held-out dialogs, compared with the right ones word for word."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..data.dialogs import Message, Part, dialog_sample
from ..data.shards import Sample
from .chat import reply_batch
from .compose import ComposedModel
from .metrics import exact_match


class Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass
class Answer:
    """One question and what the model said.

    Args:
        index: of the sample in its set.
        kind: of the question, as the sample's json says; "" where it does not.
        choices: how many answers were possible; 0 where the sample does not say.
        prompt: the text of the last question ("" where it was spoken).
        expected, given: the right answer and the model's.
    """

    index: int
    kind: str
    choices: int
    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """`metrics.exact_match`."""
        return bool(exact_match(self.given, [self.expected]))


@dataclass
class Score:
    """Exact match over a set.

    Args:
        right, count: right answers, and all.
        chance: expected share of right answers when guessing evenly among the possible ones; None if unknown.
    """

    right: int
    count: int
    chance: float | None

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> float:
        """Half the 95% confidence interval, 1.96 sqrt(S (1 - S) / N) (section 5.1.1)."""
        return 1.96 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)


def size(samples: Samples, limit: int | None) -> int:
    """How many samples there are, `limit` at most.

    Raises:
        ValueError: limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return len(samples) if limit is None else min(len(samples), limit)


def answers(
    model: ComposedModel,
    samples: Samples,
    *,
    without: Collection[str] = (),
    batch_size: int = 50,
    max_new_tokens: int = 48,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Answer]:
    """The model's greedy answers to the last question of every dialog.

    Args:
        samples: dialog samples that end with the assistant's answer.
        without: part types that are left out of the questions, to see what can be guessed without them.
        batch_size: questions decoded together.
        max_new_tokens: of an answer.
        limit: only so many samples, the first ones.
        progress: called with the number of samples of each batch that is done.
    """
    known = {adapter.part for adapter in model.adapters.values()} | set(without)
    count = size(samples, limit)
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        dialogs = [dialog_sample(samples[i], known) for i in indices]
        prompts = [leave_out(dialog[:-1], without) for dialog in dialogs]
        replies = reply_batch(model, prompts, max_new_tokens=max_new_tokens)
        for i, dialog, given in zip(indices, dialogs, replies, strict=True):
            extra: dict[str, Any] = samples[i].json()
            yield Answer(
                index=i,
                kind=extra.get("kind", ""),
                choices=len(extra.get("choices", ())),
                prompt=dialog[-2].text,
                expected=dialog[-1].text,
                given=given,
            )
        if progress is not None:
            progress(len(indices))


def leave_out(messages: Sequence[Message], types: Collection[str]) -> list[Message]:
    """The dialog without the parts of these types."""
    kept = [(m.role, [p for p in m.parts if p.type not in types]) for m in messages]
    return [Message(role, parts or [Part("text", text="")]) for role, parts in kept]


def score(found: Collection[Answer]) -> Score:
    """
    Raises:
        ValueError: there are no answers.
    """
    if not found:
        raise ValueError("no answers to score")
    chance = None
    if all(answer.choices for answer in found):
        chance = sum(1 / answer.choices for answer in found) / len(found)
    return Score(sum(answer.right for answer in found), len(found), chance)


def score_by_kind(found: Collection[Answer]) -> dict[str, Score]:
    """The score of each kind of question."""
    kinds = sorted({answer.kind for answer in found})
    return {kind: score([answer for answer in found if answer.kind == kind]) for kind in kinds}
