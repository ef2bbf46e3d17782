"""Transcripts as subtitles: SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .alignment import Word
from .transcribe import TextSegment

MAX_LETTERS, MAX_SECONDS = 84, 7.0
"""Of a cue, two lines of 42, as broadcasters have it."""


@dataclass(frozen=True)
class Cue:
    """A text that is shown from `start` to `end` seconds."""

    start: float
    end: float
    text: str


def cues(segments: Sequence[TextSegment]) -> list[Cue]:
    """What is shown when. A segment that is too long for one cue is divided at words where their times are known, in
    equal parts of its letters where not."""
    made: list[Cue] = []
    for segment in segments:
        words = segment.words or _even_words(segment)
        shown: list[Word] = []
        for word in words:
            letters = sum(len(other.text) + 1 for other in shown) + len(word.text)
            if shown and (letters > MAX_LETTERS or word.end - shown[0].start > MAX_SECONDS):
                made.append(_cue(shown))
                shown = []
            shown.append(word)
        if shown:
            made.append(_cue(shown))
    return made


def srt(segments: Sequence[TextSegment]) -> str:
    """A SubRip file."""
    return "".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text.replace('-->', '->')}\n\n"
        for number, cue in enumerate(cues(segments), start=1)
    )


def vtt(segments: Sequence[TextSegment]) -> str:
    """A WebVTT file."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_escaped(cue.text)}\n\n" for cue in cues(segments)
    )


def _even_words(segment: TextSegment) -> list[Word]:
    words, at, made = segment.text.split(), 0, []
    letters = sum(map(len, words))
    for word in words:
        start, end = ((segment.start + (segment.end - segment.start) * n / letters) for n in (at, at + len(word)))
        made.append(Word(word, start, end, 0.0))
        at += len(word)
    return made


def _cue(words: Sequence[Word]) -> Cue:
    return Cue(words[0].start, words[-1].end, " ".join(word.text for word in words))


def _clock(seconds: float, point: str) -> str:
    thousandths = round(1000 * seconds)
    hours, rest = divmod(thousandths, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def _escaped(text: str) -> str:
    """WebVTT takes these for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
