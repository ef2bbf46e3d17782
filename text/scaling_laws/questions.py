"""Questions made of held-out documents, on the order of their words, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch.nn import functional as F

from ..model import Transformer
from ..rows import IGNORE, Document, lay_out
from ..tokenizer import Tokenizer
from .recipe import ForecastConfig

ROWS = 64
"""Rows of one forward pass."""
_TRIES = 100
"""Orders drawn for a question; three words have six."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """
    Args:
        prompt: a text.
        choices: how it may go on, each with the space before it.
        answer: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """`nll`: mean over the questions of the NLL of the correct answer per character. `accuracy`: the part of the
    questions whose correct answer has the lowest NLL per character of all choices."""

    nll: float
    accuracy: float


def word_orders(documents: Sequence[str], config: ForecastConfig, seed: int = 0) -> list[Question]:
    """Questions made of documents, see `ForecastConfig`. The same seed gives the same questions.

    Raises:
        ValueError: the documents are too short for one question.
    """
    rng = Random(f"{seed}/word orders")
    questions = []
    for prompt, right in (cut for text in documents for cut in _cut(text, config)):
        words = right.split(" ")[1:]
        choices = {right}
        for _ in range(_TRIES):
            if len(choices) < config.choices:
                choices.add(" " + " ".join(rng.sample(words, len(words))))
        if len(choices) == config.choices:
            shuffled = rng.sample(sorted(choices), config.choices)
            questions.append(Question(prompt=prompt, choices=tuple(shuffled), answer=shuffled.index(right)))
    if not questions:
        raise ValueError(
            f"{len(documents)} held-out documents give no question: they are too short for prompts of "
            f"{config.prompt_chars} characters and answers of {config.answer_chars}, or the answers have too few words "
            f"for {config.choices} orders"
        )
    return rng.sample(questions, min(config.questions, len(questions)))


def _cut(text: str, config: ForecastConfig) -> Iterator[tuple[str, str]]:
    """(prompt, what follows it) without overlap; both end before a space."""
    start = 0
    while True:
        middle = text.find(" ", start + config.prompt_chars)
        end = text.find(" ", middle + config.answer_chars)
        if middle < 0 or end < 0:
            return
        yield text[start:middle], text[middle:end]
        start = end


def answer(model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question]) -> Answers:
    """Asks a model of any tokenizer."""
    rows = []
    for question in questions:
        prompt = tokenizer.encode(question.prompt, bos=True)
        for choice in question.choices:
            tokens = tokenizer.encode(choice)
            rows.append(Document([*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens)))
    losses = [loss for loss, _ in row_losses(model, rows, tokenizer.pad_id)]
    nll, right, at = 0.0, 0, 0
    for question in questions:
        scores = [losses[at + i] / len(choice) for i, choice in enumerate(question.choices)]
        at += len(scores)
        nll += scores[question.answer]
        right += scores.index(min(scores)) == question.answer
    return Answers(nll=nll / len(questions), accuracy=right / len(questions))


@torch.inference_mode()
def row_losses(model: Transformer, rows: Sequence[Document], pad_id: int) -> list[tuple[float, int]]:
    """For each row, a document of its own: the summed NLL of its targets, and how many there are."""
    device = model.norm.weight.device
    found: list[tuple[float, int]] = []
    for start in range(0, len(rows), ROWS):
        batch = lay_out([[row] for row in rows[start : start + ROWS]], pad_id).to(device)
        logits = model.unembed(model.hidden(batch.tokens)).float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORE, reduction="none")
        sums = losses.double().sum(1).tolist()
        found += zip(sums, (batch.labels != IGNORE).sum(1).tolist(), strict=True)
    return found
