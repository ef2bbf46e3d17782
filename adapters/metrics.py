"""Scores of answers by the rules of the benchmarks of sections 7.6 and 7.7: each between 0 and 1, for one question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ARTICLES = ("a", "an", "the")
DIGITS: dict[str, str] = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_WITH_APOSTROPHE = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTIONS.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
"""Those of the official evaluation of VQA: written without one of their apostrophes, words count as these. The last one
is as it is there; those that it has for "I" are left out, since it looks them up in lower case and never finds them."""


def plain(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def exact_match(given: str, answers: Sequence[str]) -> float:
    """1 where the answer is one of these in `plain` form."""
    return float(any(plain(given) == plain(answer) for answer in answers))


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """VQAv2 (arXiv 1612.00837): an answer is right to the degree that people gave it, min(matches / 3, 1), averaged
    over the sets that leave out one of them; with a single answer, whether it is that one. Both sides are compared as
    `vqa_form`, which the official code leaves out where all people said the same, letter for letter."""
    found, people = vqa_form(given), [vqa_form(answer) for answer in answers]
    if len(people) == 1:
        return float(found == people[0])
    scores = []
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        scores.append(min(others.count(found) / 3, 1.0))
    return sum(scores) / len(scores)


def vqa_form(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten in digits, contractions with apostrophes, as the
    official evaluation makes them. A mark becomes a space, or nothing where it stands beside one anywhere in the answer
    or the answer has a number with a comma."""
    written = text = " ".join(answer.lower().split())
    comma_in_number = re.search(r"\d,\d", written) is not None
    for mark in _PUNCTUATION:
        glued = not (f"{mark} " in written or f" {mark}" in written or comma_in_number)
        text = text.replace(mark, " " if glued else "")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.split()]
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


def anls(given: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """The normalised Levenshtein similarity to the nearest answer, 0 below the threshold (DocVQA, arXiv 1905.13648; the
    mean over questions is ANLS). Letter case and white space at the ends do not count.

    Raises:
        ModuleNotFoundError: rapidfuzz, of the extra `evaluation`, is not installed.
    """
    similarity = levenshtein().normalized_similarity

    def form(text: str) -> str:
        return " ".join(text.strip().lower().split())

    nearest = max(similarity(form(given), form(answer)) for answer in answers)
    return nearest if nearest >= threshold else 0.0


def levenshtein() -> Any:
    """rapidfuzz's edit distance.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("rapidfuzz is missing: pip install 'herdkit[evaluation]'") from error
    return Levenshtein


def relaxed_accuracy(given: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA (arXiv 2203.10244): numbers within five percent of the right one, all else equal but for case."""
    return float(any(_relaxed(given, answer, tolerance) for answer in answers))


def _relaxed(given: str, answer: str, tolerance: float) -> bool:
    found, wanted = number_of(given), number_of(answer)
    if found is None or wanted is None:
        return plain(given) == plain(answer)
    return found == wanted if wanted == 0 else abs(found - wanted) / abs(wanted) <= tolerance


def number_of(text: str) -> float | None:
    """The number that a text is, percent as its hundredth; None where it is none."""
    text = plain(text).replace(",", "").removeprefix("$").strip()
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?%?", text) is None:
        return None
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)
