"""Questions of samples of shards, in the words of a prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.dialogs import MEDIA_TYPES, Message, Part, dialog_sample
from ..data.media_check import kind_of, part_types
from ..data.shards import Sample
from .multiple_choice import listed

PROMPTS = {
    "none": "{question}",
    "choice": (
        "Select the correct answer from the following options: {question} {choices}. "
        "Answer with the correct option letter and nothing else."
    ),
    "short": "Answer the question using a single word or phrase. {question}.",
}
"""How a question is put to the model; "choice" and "short" as in section 7.7 of the paper, where `{question}` holds the
choices too."""


@dataclass
class Question:
    """
    Args:
        kind: its category; "" where the sample has none.
        prompt: the dialog up to the answer.
        answers: all that count as right, at least one.
        choices: the possible answers; empty where the sample does not say.
    """

    kind: str
    prompt: list[Message]
    answers: list[str]
    choices: list[str]


def check_prompt(prompt: str) -> None:
    """
    Raises:
        ValueError: the prompt has not `{question}` once, or another word in braces than that and `{choices}`.
    """
    unknown = set(re.findall(r"\{(\w+)\}", prompt)) - {"question", "choices"}
    if prompt.count("{question}") != 1 or unknown:
        raise ValueError(
            f"{prompt!r} must hold {{question}} once, perhaps {{choices}}, and no other word in braces; known prompts "
            f"are {', '.join(PROMPTS)}"
        )


def place(sample: Sample) -> str:
    """How errors name a sample."""
    return f"{sample.shard}: sample {sample.key}"


def question_of(sample: Sample, known: Collection[str], prompt: str) -> Question:
    """The question of a sample: of its member `json` the `messages`, a dialog that ends with the right answer, or a
    `question` about the images, videos and sounds among its other members, in their order. `answers` there holds all
    right ones (`answer` a single one), `choices` the possible ones, `kind` the category.

    Args:
        known: part types that somebody takes.
        prompt: see `worded`.

    Raises:
        ValueError: something is missing or of another kind, or nobody takes a medium; names the sample.
    """
    where, content = place(sample), _content(sample)
    choices = _texts(content.get("choices", []), "choices", where)
    answers = _texts(content.get("answers", [content["answer"]] if "answer" in content else []), "answers", where)
    if "messages" in content:
        asked = dialog_sample(sample, known)
        if len(asked) < 2 or asked[-1].role != "assistant" or asked[-2].role != "user":
            raise ValueError(f"{where}: the dialog must end with a question and its answer")
        *asked, question, answer = asked
        parts, answers = question.parts, answers or [answer.text]
    elif isinstance(content.get("question"), str):
        asked, parts = [], [*_media(sample, known), Part("text", text=content["question"])]
    else:
        raise ValueError(f"{where}: its member json has neither messages nor a question")
    if not answers:
        raise ValueError(f"{where}: no right answer; give answers, answer, or a dialog that ends with it")
    if "{choices}" in prompt and not choices:
        raise ValueError(f"{where} has no choices, which the prompt lists")
    asked.append(Message("user", worded(prompt, parts, choices)))
    return Question(str(content.get("kind", "")), asked, answers, choices)


def worded(prompt: str, parts: Sequence[Part], choices: Sequence[str] = ()) -> list[Part]:
    """The parts of a question, in their order, in a prompt: what stands before `{question}` comes before the first
    text, so that media at the beginning stay there, and what stands behind it at the end. A full stop behind it goes
    where the question ends with a mark of its own, or a medium.

    Args:
        prompt: with `{question}` once (see `check_prompt`), and `{choices}` where those are to be listed.
    """
    before, after = (text.replace("{choices}", listed(choices)) for text in prompt.split("{question}"))
    made = list(parts)
    if after:
        if made[-1].type == "text":
            made[-1] = Part("text", text=(made[-1].text or "").rstrip())
        if made[-1].type != "text" or (made[-1].text or "").endswith((".", "?", "!", ":")):
            after = after.removeprefix(".")
        made.append(Part("text", text=after))
    if before:
        first = next((i for i, part in enumerate(parts) if part.type == "text"), None)
        if first is not None:
            made[first] = Part("text", text=(made[first].text or "").lstrip())
        made.insert(first or 0, Part("text", text=before))
    return made


def media_of(sample: Sample) -> list[Part]:
    """All media that the question of a sample is about, for looking at."""
    content = _content(sample)
    if "messages" not in content:
        return _media(sample, MEDIA_TYPES)
    return [part for message in dialog_sample(sample, part_types(content["messages"])) for part in message.media]


def _content(sample: Sample) -> Mapping[str, Any]:
    content = sample.json()
    if not isinstance(content, Mapping):
        raise ValueError(f"{place(sample)}: its member json is no object")
    return content


def _texts(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, not {value!r}")
    return [str(item) for item in value]


def _media(sample: Sample, known: Collection[str]) -> list[Part]:
    parts = []
    for name, content in sample.members.items():
        kind = kind_of(name)
        if kind is None:
            raise ValueError(f"{place(sample)}: what its member {name!r} is cannot be told from the name")
        if kind in MEDIA_TYPES:
            if kind not in known:
                raise ValueError(
                    f"{place(sample)}: its member {name!r} is {kind}, which the model has no adapter for; with "
                    f"--without {kind} it is left out"
                )
            parts.append(Part(kind, media=content))
    return parts
