"""Which of the choices an answer means (sections 7.6 and 7.7): what is not understood is wrong, and never guessed."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from .metrics import plain

_WORDS = {"A", "I"}
"""Letters that are words too, and taken for them before any word but those of `_NOT_A_NOUN`."""

_AT_END = re.compile(r"\s*([.,;:!?)]|$)")
_ANOTHER = re.compile(r"\s*(?:[,/&]|\b(?:or|and)\b)\s*")
_NOT_A_NOUN = re.compile(r"\s*(?:[/&]|\b(?:or|and|because|since|is)\b)")
_NEGATED = re.compile(r"(?:\b(?:not|nor|neither|never)|n't)\s+(?:(?:a|an|the|option|choice|answer)\s+)*[(\[{]?$", re.I)


def label(number: int) -> str:
    """The letter of a choice, counted from 0: A to Z, then AA, AB ..."""
    before, last = divmod(number, 26)
    return (label(before - 1) if before else "") + string.ascii_uppercase[last]


def listed(choices: Sequence[str]) -> str:
    """Choices as they stand in a question: "(A) red (B) blue"."""
    return " ".join(f"({label(i)}) {text}" for i, text in enumerate(choices))


def multiple_choice(given: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """Whether the answer means the right choice, which is given by its letter or its text.

    Raises:
        ValueError: the right answer is no choice.
    """
    return float(chosen(given, choices) in {right_choice(answer, choices) for answer in answers})


def right_choice(answer: str, choices: Sequence[str]) -> int:
    """The choice that a right answer names by its text or, where that is none, its letter.

    Raises:
        ValueError: it names none.
    """
    if answer in choices:
        return list(choices).index(answer)
    labels = [label(i) for i in range(len(choices))]
    letter = answer.strip().strip("().").upper()
    if letter not in labels:
        raise ValueError(f"the right answer {answer!r} is none of the choices {list(choices)}")
    return labels.index(letter)


def chosen(given: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer means, or None where it cannot be told.

    The first of these that says anything decides; where it says several things, the answer means none:

    1. the whole answer is a letter: "B", "(b).", "**B**";
    2. or the text of a choice;
    3. a letter after "answer", "answer is" or "answer:", small only in brackets or at the end of a sentence;
    4. a letter with a mark at the start, "B) blue", unless what follows is the text of another choice;
    5. all that is mentioned: texts of choices, but for those within longer ones, letters in brackets, and capital
       letters that stand alone. "A" and "I" before a word are that word, and what follows "not" is not mentioned.
    """
    labels = {label(i): i for i in range(len(choices))}
    if not labels:
        return None
    letter = "|".join(labels)
    texts = [plain(_unmarked(choice)) for choice in choices]
    text = " ".join(_unmarked(given).strip("_\"' \n").split())

    alone = re.fullmatch(rf"[(\[{{]?({letter})[)\]}}]?[.:,)]?", text, re.IGNORECASE)
    if alone:
        return labels[alone[1].upper()]

    same = {i for i, choice in enumerate(texts) if choice == plain(text)}
    if same:
        return _only(same)

    stated = _stated(text, letter)
    if stated:
        return _only({labels[said] for said in stated})

    begun = re.match(rf"(?:\(({letter})\)[.:]?|({letter})[.:]|((?i:{letter}))\))\s(.*)", text)
    if begun and not _ANOTHER.match(begun[4]):
        found = labels[(begun[1] or begun[2] or begun[3]).upper()]
        return found if plain(begun[4]) == texts[found] or plain(begun[4]) not in texts else None

    return _only(_mentioned(text, texts, letter, labels))


def _unmarked(text: str) -> str:
    """Without Markdown's marks of bold and code."""
    return re.sub(r"[*`]", "", text)


def _only(found: set[int]) -> int | None:
    return next(iter(found)) if len(found) == 1 else None


def _stated(text: str, letter: str) -> set[str]:
    """The letters after "answer", in capitals."""
    one = rf"([(\[{{]?)({letter})(?![\w'\u2019+#-])[)\]}}]?"
    found = set()
    for match in re.finditer(rf"\banswer(?:\s+is)?\s*[:\uff1a]?\s*(?:(?:option|choice)\s+)?{one}", text, re.IGNORECASE):
        bracket, said, rest = match[1], match[2], text[match.end() :]
        capital = said.isupper() and said not in _WORDS
        if bracket or capital or _AT_END.match(rest) or _NOT_A_NOUN.match(rest):
            found.add(said.upper())
            while following := re.match(_ANOTHER.pattern + one, rest):
                found.add(following[2])
                rest = rest[following.end() :]
    return found


def _mentioned(text: str, texts: Sequence[str], letter: str, labels: dict[str, int]) -> set[int]:
    spans = []
    for i, choice in enumerate(texts):
        # "green" is not in "blue-green", nor 1 in 1.5, 1,000 or 1%.
        pattern = rf"(?<![\w-])(?<!\d[.,]){re.escape(choice)}(?![\w%-]|[.,]\d)"
        spans += [(*match.span(), i) for match in re.finditer(pattern, text, re.IGNORECASE) if choice]
    whole = [
        (start, end, i)
        for start, end, i in spans
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
    ]
    found = {i for start, _, i in whole if not _NEGATED.search(text[:start])}
    single = rf"[(\[{{]((?i:{letter}))[)\]}}]|(?<![\w'\u2019.-])({letter})(?![\w'\u2019+#-]|\.\w)"
    for match in re.finditer(single, text):
        bare, rest = match[2], text[match.end() :]
        word = bare in _WORDS and re.match(r"\s\w", rest) and not _NOT_A_NOUN.match(rest)
        inside = any(start <= match.start() and match.end() <= end for start, end, _ in whole)
        if not word and not inside and not _NEGATED.search(text[: match.start()]):
            found.add(labels[(match[1] or bare).upper()])
    return found
