"""A model's answers to the questions of shards, by the rules of a benchmark: scores with confidence intervals, in all
and by category, and everything that was asked and answered, token for token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..data.shards import Sample
from ..text.generate import generate
from ..text.sampling import SamplingOptions
from .chat import decoder, encode_prompts
from .compose import ComposedModel
from .evaluate import Samples, leave_out, size
from .evaluate_questions import Question, check_prompt, place, question_of
from .metrics import anls, exact_match, levenshtein, relaxed_accuracy, vqa_accuracy
from .multiple_choice import chosen, multiple_choice, right_choice

Metric = Literal["exact", "vqa", "anls", "relaxed", "choice", "caption"]

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
}


@dataclass
class Marked:
    """An answer with its score.

    Args:
        id: position of the sample in the set.
        key: of the sample. kind: its category ("" where it has none).
        question: the text of the last message that was asked.
        prompt, tokens: what the model was given, special tokens by name, and the ids.
        answers: all that count as right. choices: the possible ones, where the sample says.
        understood: of multiple choice, the choice that the answer was taken for, None where it could not be told.
    """

    id: int
    key: str
    kind: str
    question: str
    prompt: str
    tokens: list[int]
    answers: list[str]
    choices: list[str]
    given: str
    score: float
    understood: str | None = None


@dataclass
class Mean:
    """The mean of the scores of `count` questions; half its 95% confidence interval, 1.96 times the standard error
    (section 5.1.1: for right and wrong alone that is 1.96 sqrt(S (1 - S) / N))."""

    score: float
    interval: float
    count: int

    @classmethod
    def of(cls, scores: Collection[float]) -> Mean:
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        return cls(mean, 1.96 * math.sqrt(variance / len(scores)), len(scores))


@dataclass
class Report:
    """
    Args:
        metric: by which it was scored.
        mean: of all questions; kinds: of those of each category.
        not_understood: answers of multiple choice that could not be told.
        captions: corpus scores of captions, with half their 95% intervals from 1000 resamplings.
    """

    metric: str
    mean: Mean
    kinds: dict[str, Mean] = field(default_factory=dict)
    not_understood: int = 0
    captions: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Evaluation:
    """How questions are put and answers are scored.

    Args:
        metric: the rule.
        prompt: see `evaluate_questions.worded`.
        without: part types that are left out of the questions, to see what can be guessed without them.
        batch_size: questions decoded together. max_new_tokens: of an answer.

    Raises:
        ValueError: what is not possible. ModuleNotFoundError: the metric needs a package that is not installed.
    """

    metric: Metric = "exact"
    prompt: str = "{question}"
    without: Sequence[str] = ()
    batch_size: int = 16
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.metric == "anls":
            levenshtein()
        if self.metric == "caption":
            _sacrebleu()

    def question(self, model: ComposedModel, sample: Sample) -> Question:
        """
        Raises:
            ValueError: see `question_of`; a question of multiple choice has no choices, or its right answer is none of
                them.
        """
        known = {adapter.part for adapter in model.adapters.values()} | set(self.without)
        question = question_of(sample, known, self.prompt)
        if self.metric == "choice":
            if not question.choices:
                raise ValueError(f"{place(sample)} has no choices")
            for answer in question.answers:
                try:
                    right_choice(answer, question.choices)
                except ValueError as error:
                    raise ValueError(f"{place(sample)}: {error}") from None
        return question

    def batches(
        self, model: ComposedModel, samples: Samples, limit: int | None = None, done: Collection[int] = ()
    ) -> Iterator[list[Marked]]:
        """The model's greedy answers to the questions of samples, with their scores.

        Args:
            limit: only so many samples, the first ones.
            done: positions of samples that have been asked. A batch without any other is left out, one with some others
                is asked again as a whole: the last digits of a row depend on those beside it.

        Raises:
            ValueError: see `question`.
        """
        count = size(samples, limit)
        for start in range(0, count, self.batch_size):
            positions = range(start, min(start + self.batch_size, count))
            if not all(position in done for position in positions):
                yield self._batch(model, {position: samples[position] for position in positions})

    def _batch(self, model: ComposedModel, samples: dict[int, Sample]) -> list[Marked]:
        questions = [self.question(model, sample) for sample in samples.values()]
        prompts, inputs, tokenizer = encode_prompts(model, [leave_out(q.prompt, self.without) for q in questions])
        sampling = SamplingOptions(stop_ids=tokenizer.stop_ids, max_new_tokens=self.max_new_tokens)
        rows = generate(model.text, prompts, sampling, tokenizer=tokenizer, forward=decoder(model, inputs))
        marked = []
        for (position, sample), question, tokens, row in zip(samples.items(), questions, prompts, rows, strict=True):
            given = row.text(tokenizer).strip()
            score, understood = self._score(given, question)
            marked.append(
                Marked(
                    id=position,
                    key=sample.key,
                    kind=question.kind,
                    question=question.prompt[-1].text,
                    prompt=tokenizer.decode(tokens, keep_special=True),
                    tokens=tokens,
                    answers=question.answers,
                    choices=question.choices,
                    given=given,
                    score=score,
                    understood=understood,
                )
            )
        return marked

    def _score(self, given: str, question: Question) -> tuple[float, str | None]:
        if self.metric == "choice":
            choice = chosen(given, question.choices)
            score = multiple_choice(given, question.answers, question.choices)
            return score, None if choice is None else question.choices[choice]
        if self.metric == "caption":
            return sentence_chrf(given, question.answers), None
        return METRICS[self.metric](given, question.answers), None


def report(found: Sequence[Marked], metric: Metric) -> Report:
    """
    Raises:
        ValueError: there are no answers.
    """
    if not found:
        raise ValueError("no answers to score")
    kinds: dict[str, list[float]] = defaultdict(list)
    for answer in found:
        kinds[answer.kind].append(answer.score)
    made = Report(metric, Mean.of([answer.score for answer in found]))
    if set(kinds) != {""}:
        made.kinds = {kind: Mean.of(scores) for kind, scores in sorted(kinds.items())}
    if metric == "choice":
        made.not_understood = sum(answer.understood is None for answer in found)
    if metric == "caption":
        made.captions = caption_scores([answer.given for answer in found], [answer.answers for answer in found])
    return made


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sacrebleu is missing: pip install 'herdkit[evaluation]'") from error
    return metrics


def sentence_chrf(given: str, answers: Sequence[str]) -> float:
    """chrF of one caption against several, by sacrebleu, as a fraction."""
    return _sacrebleu().CHRF().sentence_score(given, list(answers)).score / 100


def caption_scores(given: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, tuple[float, float]]:
    """Corpus BLEU and chrF by sacrebleu, in percent, each with half its 95% interval."""
    metrics, most = _sacrebleu(), max(map(len, answers))
    references = [[row[i] if i < len(row) else None for row in answers] for i in range(most)]
    found = {}
    for name, kind in (("bleu", metrics.BLEU), ("chrf", metrics.CHRF)):
        score = kind(references=references).corpus_score(list(given), None, n_bootstrap=1000)
        found[name] = (score.score, score._ci)
    return found


def as_table(made: Report) -> str:
    """The scores in percent, by category and in all."""
    rows = [*made.kinds.items(), ("all", made.mean)]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{name:<{width}}  {100 * mean.score:6.2f} ± {100 * mean.interval:5.2f}  of {mean.count}" for name, mean in rows
    ]
    lines += [f"{name:<{width}}  {score:6.2f} ± {interval:5.2f}" for name, (score, interval) in made.captions.items()]
    if made.metric == "choice" and made.not_understood:
        lines.append(f"{made.not_understood} answers could not be told and count as wrong")
    return "\n".join(lines)
