"""Spoken questions with known answers, put to a model by each route: directly, as the cascade does (the transcript in
place of the recording), and in the true words where they are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.chat import reply_batch
from ..adapters.evaluate_questions import Question, place, question_of
from ..adapters.evaluate_shards import Mean
from ..adapters.metrics import exact_match
from ..data.dialogs import Message, Part
from ..data.shards import Sample
from .transcribe import Transcriber
from .transcribe_files import Recording


@dataclass
class SpokenAnswers:
    """What a model answers to one spoken question.

    Args:
        id: of the recording.
        answers: all that count as right.
        said: the true words of the question; "" where they are not known.
        heard: its transcript, "" where there is none.
        given: the answers by route; of "cascade" and "written" only where there are words to answer.
    """

    id: str
    answers: list[str]
    said: str
    heard: str
    given: dict[str, str]

    def right(self, route: str) -> float:
        """1 where the route's answer is one of the right ones, by `herdkit.adapters.metrics.exact_match`, else 0."""
        return exact_match(self.given.get(route, ""), self.answers)


def spoken_question(sample: Sample) -> Question:
    """The question of a sample whose dialog has one recording, in the last question; see `question_of`.

    Raises:
        ValueError: there is no such question, or no right answer; names the sample.
    """
    question = question_of(sample, ("audio",), "{question}")
    recordings = [len(message.media) for message in question.prompt]
    if recordings[-1] != 1 or sum(recordings) != 1:
        raise ValueError(
            f"{place(sample)}: a spoken question has one recording, in the last turn before the answer; this has "
            f"{recordings[-1]} there and {sum(recordings)} in all"
        )
    return question


def in_words(messages: Sequence[Message], words: str) -> list[Message]:
    """A dialog with these words in place of its recordings."""
    return [
        Message(m.role, [Part("text", text=words) if part.type == "audio" else part for part in m.parts])
        for m in messages
    ]


def ask(transcriber: Transcriber, dialogs: Sequence[Sequence[Message]], max_new_tokens: int = 64) -> list[str]:
    """The most probable answers of the transcriber's model, `batch_size` of its config together."""
    answers: list[str] = []
    size = transcriber.config.batch_size
    for first in range(0, len(dialogs), size):
        chosen = [list(dialog) for dialog in dialogs[first : first + size]]
        answers += [answer.strip() for answer in reply_batch(transcriber.model, chosen, max_new_tokens=max_new_tokens)]
    return answers


def answer_questions(
    transcriber: Transcriber, recordings: Sequence[Recording], lines: Sequence[dict[str, Any]]
) -> Iterator[SpokenAnswers]:
    """Asks the questions of samples by every route.

    Args:
        recordings: samples of shards.
        lines: their transcripts, as `transcribe_files` writes them. Recordings with an error are left out; where there
            is no transcript, the cascade has no answer, which is wrong.

    Raises:
        ValueError: a recording that is no sample's; see `spoken_question`.
    """
    pairs = [(recording, line) for recording, line in zip(recordings, lines, strict=True) if line["status"] != "error"]
    size = transcriber.config.batch_size
    for first in range(0, len(pairs), size):
        questions, found = [], []
        for recording, line in pairs[first : first + size]:
            if isinstance(recording.source, str):
                raise ValueError(f"{recording.id}: a file has no question; spoken questions are samples of shards")
            reader, position = recording.source
            questions.append(spoken_question(reader[position]))
            found.append(SpokenAnswers(line["id"], questions[-1].answers, line.get("reference", ""), line["text"], {}))
        words = {"direct": [None] * len(found), "cascade": [x.heard for x in found], "written": [x.said for x in found]}
        for route, texts in words.items():
            asked = [
                (one, question.prompt if text is None else in_words(question.prompt, text))
                for one, question, text in zip(found, questions, texts, strict=True)
                if text != ""
            ]
            for (one, _), answer in zip(asked, ask(transcriber, [dialog for _, dialog in asked]), strict=True):
                one.given[route] = answer
        yield from found


def scores(answered: Sequence[SpokenAnswers]) -> dict[str, Mean]:
    """The share of right answers of each route, of "written" among the questions whose true words are known."""
    of_route = {"direct": answered, "cascade": answered, "written": [one for one in answered if one.said]}
    return {route: Mean.of([one.right(route) for one in found]) for route, found in of_route.items() if found}
