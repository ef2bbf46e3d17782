"""Errors of transcripts and translations, with confidence intervals: words, characters (jiwer) and BLEU (sacrebleu)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .prompts import BY_CHARACTERS

DRAWS = 1000
"""Bootstrap samples of a confidence interval."""

Normaliser = Literal["standard", "plain"]
"""`plain`: lower case, single spaces. `standard`: also what Whisper's normaliser does to any language (compatibility
forms, no brackets with what they hold, no symbols and punctuation)."""


def normalise(text: str, how: Normaliser = "standard") -> str:
    """A text as it is compared.

    The letters of scripts that are written with combining marks, such as Thai and Hindi, keep them; Whisper's own drops
    those, and with them vowels.
    """
    text = text.lower()
    if how == "plain":
        return " ".join(text.split())
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text)
    text = re.sub(r"\(([^)]+?)\)", "", text)
    text = "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in unicodedata.normalize("NFKC", text))
    return " ".join(text.lower().split())  # compatibility forms may be capital letters


@dataclass
class Errors:
    """Errors over a set of utterances.

    Args:
        errors: substitutions, insertions and deletions; of each utterance.
        units: words or characters of each reference.
    """

    errors: list[int]
    units: list[int]

    @property
    def rate(self) -> float:
        """Errors for each unit of the references, of all together."""
        return sum(self.errors) / sum(self.units)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the rate, by the bootstrap over utterances."""
        errors, units = np.array(self.errors), np.array(self.units)
        return bootstrap(len(errors), lambda drawn: errors[drawn].sum() / max(units[drawn].sum(), 1))


def bootstrap(count: int, rate: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """The 95% interval of `rate(indices)` over samples of `count` with replacement; the same at every call."""
    generator = np.random.default_rng(0)
    found = [rate(generator.integers(0, count, count)) for _ in range(DRAWS)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def word_errors(references: Sequence[str], transcripts: Sequence[str], normaliser: Normaliser = "standard") -> Errors:
    """Word errors of each utterance, after normalisation.

    An empty reference (silence, noise) counts every word of its transcript as an insertion.

    Raises:
        ValueError: the lists differ in length, or there is no reference word.
        ModuleNotFoundError: jiwer is not installed; names the extra.
    """
    return _errors(references, transcripts, normaliser, "process_words")


def character_errors(
    references: Sequence[str], transcripts: Sequence[str], normaliser: Normaliser = "standard"
) -> Errors:
    """The same for characters, without the white space that scripts such as Thai may or may not have."""
    references, transcripts = ([normalise(text, normaliser).replace(" ", "") for text in texts]
                               for texts in (references, transcripts))  # fmt: skip
    return _errors(references, transcripts, "plain", "process_characters")


def errors_in(
    language: str, references: Sequence[str], transcripts: Sequence[str], normaliser: Normaliser = "standard"
) -> Errors:
    """Errors by the unit that the paper takes for the language: characters for some, words for all others."""
    measure = character_errors if language in BY_CHARACTERS else word_errors
    return measure(references, transcripts, normaliser)


def _errors(references: Sequence[str], transcripts: Sequence[str], normaliser: Normaliser, process: str) -> Errors:
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('error rates need jiwer: pip install "herdkit[evaluation]"') from error
    if len(references) != len(transcripts):
        raise ValueError(f"{len(references)} references, but {len(transcripts)} transcripts")
    said, heard = ([normalise(text, normaliser) for text in texts] for texts in (references, transcripts))
    if not any(said):
        raise ValueError("the references hold no words")
    errors, units = [], []
    for one, other in zip(said, heard, strict=True):
        counted = getattr(jiwer, process)(one, other)
        errors.append(counted.substitutions + counted.insertions + counted.deletions)
        units.append(counted.hits + counted.substitutions + counted.deletions)
    return Errors(errors, units)


@dataclass
class Bleu:
    """BLEU of a set of translations: `score`, 0..100, its 95% interval by sacrebleu's bootstrap, and the `signature` of
    how it was computed."""

    score: float
    interval: tuple[float, float]
    signature: str


def bleu(references: Sequence[str], translations: Sequence[str], language: str = "English") -> Bleu:
    """BLEU by sacrebleu: its tokenizer 13a, or zh, or by characters for Japanese, Korean and Thai, whose own tokenizers
    need further packages.

    Raises:
        ValueError: the lists differ in length or are empty.
        ModuleNotFoundError: sacrebleu is not installed; names the extra.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('BLEU needs sacrebleu: pip install "herdkit[evaluation]"') from error
    if len(references) != len(translations) or not references:
        raise ValueError(f"{len(references)} references, and {len(translations)} translations")
    tokenizer = "zh" if language == "Chinese" else "char" if language in BY_CHARACTERS else "13a"
    metric = BLEU(tokenize=tokenizer)
    found: Any = metric.corpus_score(list(translations), [list(references)], n_bootstrap=DRAWS)
    return Bleu(found.score, (found._mean - found._ci, found._mean + found._ci), str(metric.get_signature()))


@dataclass(frozen=True)
class Row:
    """A line of a table of error rates: of `count` utterances."""

    name: str
    count: int
    rate: float
    interval: tuple[float, float]


def by_group(
    groups: Iterable[str], references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str]
) -> list[Row]:
    """Error rates of groups of utterances (languages, ranges of length), in the order of their names, and of all, last.
    Groups without a reference word are left out."""
    found: dict[str, Errors] = {}
    everything = Errors([], [])
    for group, language, said, heard in zip(groups, languages, references, transcripts, strict=True):
        if not normalise(said):
            continue
        one = errors_in(language, [said], [heard])
        for errors in (found.setdefault(group, Errors([], [])), everything):
            errors.errors += one.errors
            errors.units += one.units
    rows = [*sorted(found.items()), ("all", everything)] if found else []
    return [Row(name, len(errors.errors), errors.rate, errors.interval) for name, errors in rows]


def length_group(seconds: float, edges: Sequence[float] = (2, 5, 10, 20, 30, 60)) -> str:
    """The range of lengths that a recording is in, named so that names sort as ranges do: "05-10 s"."""
    low = 0
    for edge in edges:
        if seconds < edge:
            return f"{low:02g}-{edge:02g} s"
        low = edge
    return f"over {low:g} s"


@dataclass
class Hallucination:
    """What is said where nobody speaks: of `count` recordings, `spoken` got words, `words` altogether."""

    count: int
    spoken: int
    words: int


def hallucination(transcripts: Sequence[str]) -> Hallucination:
    """Counts the words of transcripts of silence and noise."""
    words = [len(normalise(text).split()) for text in transcripts]
    return Hallucination(len(words), sum(map(bool, words)), sum(words))


def made_silence(sample_rate: int, seconds: float, count: int) -> Mapping[str, list[np.ndarray]]:
    """Recordings in which nobody speaks, by kind, to ask a model about: digital silence, a quiet room, white and pink
    noise at several levels, a hum, clicks. Samples (n,) float32."""
    size, generator = round(seconds * sample_rate), np.random.default_rng(0)
    time = np.arange(size) / sample_rate
    levels = 10 ** (np.linspace(-50, -10, count) / 20)

    def pink() -> np.ndarray:
        spectrum = np.fft.rfft(generator.standard_normal(size))
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), size)
        return noise / noise.std()

    def clicks() -> np.ndarray:
        return (generator.random(size) < 3 / sample_rate).astype(np.float64)

    made: dict[str, list[np.ndarray]] = {"digital silence": [np.zeros(size)]}
    made["quiet room"] = [10 ** (-60 / 20) * generator.standard_normal(size) for _ in levels]
    made["white noise"] = [level * generator.standard_normal(size) for level in levels]
    made["pink noise"] = [level * pink() for level in levels]
    made["hum"] = [level * np.sin(2 * np.pi * 100 * time) for level in levels]
    made["clicks"] = [level * clicks() for level in levels]
    return {kind: [np.clip(one, -1, 1).astype(np.float32) for one in rows] for kind, rows in made.items()}
