"""A model's answers to the questions of shards, by the rules of a benchmark: scores with confidence intervals, in all
and by category, and everything that was asked and answered, token for token."""

from __future__ import annotations

import json
import math
import string
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..data.dialogs import MEDIA_TYPES, Message, Part, dialog_sample
from ..data.shards import Sample
from ..text.generate import generate
from ..text.sampling import SamplingOptions
from .chat import decoder, encode_prompts
from .compose import ComposedModel
from .evaluate import Samples, leave_out
from .metrics import anls, exact_match, relaxed_accuracy, vqa_accuracy
from .multiple_choice import chosen, multiple_choice

Metric = Literal["exact", "vqa", "anls", "relaxed", "choice", "caption"]

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
}

PROMPTS = {
    "none": "{question}",
    "choice": (
        "Select the correct answer from the following options: {question} {options}. "
        "Answer with the correct option letter and nothing else."
    ),
    "short": "Answer the question using a single word or phrase. {question}.",
}
"""How a question is put to the model; "choice" and "short" as in section 7.7 of the paper, where `{question}` holds the
options too."""


@dataclass
class Question:
    """
    Args:
        key: of the sample, kind: its category ("" where the sample has none).
        prompt: the dialog up to the answer.
        answers: all that count as right, at least one.
        options: to choose from; empty where there are none.
        media: the parts that are not text, for looking at.
    """

    key: str
    kind: str
    prompt: list[Message]
    answers: list[str]
    options: list[str]
    media: list[Part]


@dataclass
class Marked:
    """An answer with its score.

    Args:
        prompt, tokens: what the model was given, special tokens by name, and the ids.
        understood: of multiple choice, the option that the answer was taken for, None where it could not be told.
    """

    key: str
    kind: str
    prompt: str
    tokens: list[int]
    answers: list[str]
    options: list[str]
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


def question_of(sample: Sample, known: Collection[str], prompt: str) -> Question:
    """The question of a sample: of its member `json` the `messages`, a dialog that ends with the right answer, or a
    `question` about the sample's image, video or audio. `answers` there holds all right ones (`answer` a single one),
    `options` those to choose from, `kind` the category.

    Args:
        known: part types that dialogs may hold.
        prompt: a template with `{question}`, and `{options}` where there are some.

    Raises:
        ValueError: something is missing or of another kind; names the sample.
    """
    where = f"{sample.shard}: sample {sample.key}"
    content = sample.json()
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: its member json is no object")
    options = [str(option) for option in content.get("options", ())]
    answers = content.get("answers", [content["answer"]] if "answer" in content else [])
    if "messages" in content:
        messages = dialog_sample(sample, known)
        if len(messages) < 2 or messages[-1].role != "assistant" or messages[-2].role != "user":
            raise ValueError(f"{where}: the dialog must end with a question and its answer")
        answers = answers or [messages[-1].text]
        asked = messages[:-1]
        parts = [part for part in asked[-1].parts if part.type != "text"]
        asked[-1] = Message("user", [*parts, _worded(prompt, asked[-1].text, options)])
    elif isinstance(content.get("question"), str):
        media = [Part(kind, media=sample.members[name]) for kind in MEDIA_TYPES for name in _members(sample, kind)]
        asked = [Message("user", [*media, _worded(prompt, content["question"], options)])]
    else:
        raise ValueError(f"{where}: its member json has neither messages nor a question")
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: no right answer; give answers, answer, or a dialog that ends with it")
    media = [part for message in asked for part in message.media]
    return Question(sample.key, str(content.get("kind", "")), asked, [str(a) for a in answers], options, media)


_EXTENSIONS = {
    "image": ("png", "jpg", "jpeg", "webp"),
    "video": ("mp4", "webm", "mkv", "avi"),
    "audio": ("flac", "wav", "ogg", "mp3"),
}


def _members(sample: Sample, kind: str) -> list[str]:
    return [name for name in sorted(sample.members) if name.rpartition(".")[2] in _EXTENSIONS[kind]]


def _worded(prompt: str, question: str, options: Sequence[str]) -> Part:
    listed = " ".join(f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False))
    text = prompt.replace("{question}", question.strip())
    if options and "{options}" not in prompt:
        text += f" {listed}"
    return Part("text", text=text.replace("{options}", listed).replace("?.", "?").replace("..", ".").strip())


def marked_answers(
    model: ComposedModel,
    samples: Samples,
    metric: Metric,
    *,
    prompt: str = "{question}",
    without: Collection[str] = (),
    batch_size: int = 16,
    max_new_tokens: int = 64,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Question, Marked]]:
    """The model's greedy answers to the questions of samples, and their scores.

    Args:
        prompt: see `question_of`.
        without: part types that are left out of the questions, to see what can be guessed without them.
        batch_size: questions decoded together.
        limit: only so many samples, the first ones.
        progress: called with the number of samples of each batch that is done.

    Raises:
        ValueError: see `question_of`; a question of multiple choice has no options.
    """
    known = {adapter.part for adapter in model.adapters.values()} | set(without)
    count = min(len(samples), limit or len(samples))
    for start in range(0, count, batch_size):
        chosen = [samples[i] for i in range(start, min(start + batch_size, count))]
        questions = [question_of(sample, known or MEDIA_TYPES, prompt) for sample in chosen]
        for sample, question in zip(chosen, questions, strict=True):
            if metric == "choice" and not question.options:
                raise ValueError(f"{sample.shard}: sample {sample.key} has no options to choose from")
        prompts, inputs, tokenizer = encode_prompts(model, [leave_out(q.prompt, without) for q in questions])
        sampling = SamplingOptions(stop_ids=tokenizer.stop_ids, max_new_tokens=max_new_tokens)
        rows = generate(model.text, prompts, sampling, tokenizer=tokenizer, forward=decoder(model, inputs))
        for question, tokens, row in zip(questions, prompts, rows, strict=True):
            text = tokenizer.decode(tokens, keep_special=True)
            yield question, _marked(question, text, tokens, row.text(tokenizer).strip(), metric)
        if progress is not None:
            progress(len(chosen))


def _marked(question: Question, prompt: str, tokens: list[int], given: str, metric: Metric) -> Marked:
    understood = None
    if metric == "choice":
        score = multiple_choice(given, question.answers, question.options)
        option = chosen(given, question.options)
        understood = None if option is None else question.options[option]
    elif metric == "caption":
        score = sentence_chrf(given, question.answers)
    else:
        score = METRICS[metric](given, question.answers)
    return Marked(
        question.key, question.kind, prompt, tokens, question.answers, question.options, given, score, understood
    )


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


def as_lines(found: Sequence[Marked]) -> str:
    """A line of JSON for each answer."""
    return "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in found)


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
