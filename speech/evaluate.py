"""Word error rate of transcripts, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class WordErrors:
    """
    Args:
        errors: substitutions, insertions and deletions over all utterances; words: of the references.
    """

    errors: int
    words: int

    @property
    def rate(self) -> float:
        return self.errors / self.words


def word_errors(references: Sequence[str], transcripts: Sequence[str]) -> WordErrors:
    """Word errors of a whole set, after lower-casing and joining white space.

    Raises:
        ValueError: the lists differ in length, or there is no reference word.
        ModuleNotFoundError: jiwer is not installed; names the extra.
    """
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('word error rates need jiwer: pip install "herdkit[evaluation]"') from error
    if len(references) != len(transcripts):
        raise ValueError(f"{len(references)} references, but {len(transcripts)} transcripts")
    spoken, heard = ([" ".join(text.lower().split()) for text in texts] for texts in (references, transcripts))
    if not any(spoken):
        raise ValueError("the references hold no words")
    counted = jiwer.process_words(spoken, heard)
    errors = counted.substitutions + counted.insertions + counted.deletions
    return WordErrors(errors, counted.hits + counted.substitutions + counted.deletions)
