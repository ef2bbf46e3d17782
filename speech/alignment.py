"""When each word of a transcript is said: the most probable path of a CTC head through it, found by torchaudio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchaudio.functional import TokenSpan, forced_align, merge_tokens

from .ctc import least_frames


class AlignmentError(ValueError):
    """A transcript that cannot be aligned."""


@dataclass(frozen=True)
class Word:
    """One word, from `start` to `end` seconds; `score` is the mean probability of its letters on the path, 0..1."""

    text: str
    start: float
    end: float
    score: float


def align_tokens(logits: Tensor, tokens: Sequence[int], blank: int = 0) -> list[TokenSpan]:
    """The frames of each token on the most probable path.

    Args:
        logits: (T, V) of one utterance, any floating dtype.
        tokens: in 0..V-1, without the blank.

    Returns: a `TokenSpan` for each token: `start` and `end` (exclusive) in frames, `score` the mean log-probability.

    Raises:
        AlignmentError: there are none, or more than the frames hold.
    """
    if not tokens or least_frames(tokens) > len(logits):
        raise AlignmentError(f"{len(tokens)} tokens cannot be aligned with {len(logits)} frames")
    scores = logits.detach().float().log_softmax(-1).cpu()[None]
    path, path_scores = forced_align(scores, torch.tensor([tokens], dtype=torch.int32), blank=blank)
    return merge_tokens(path[0], path_scores[0], blank=blank)


def align_words(logits: Tensor, text: str, frame_seconds: float) -> list[Word]:
    """The words of a transcript, by a CTC head whose class 0 is the blank and class b + 1 the byte b of UTF-8.

    Args:
        logits: (T, 257) of the frames of one utterance.
        text: words between white space.
        frame_seconds: of a frame.

    Raises:
        AlignmentError: no word, or more bytes than the frames hold.
    """
    words = text.split()
    spans = align_tokens(logits, [byte + 1 for byte in " ".join(words).encode()])
    made, at = [], 0
    for word in words:
        own = spans[at : at + len(word.encode())]
        at += len(own) + 1  # and the space
        frames = sum(span.end - span.start for span in own)
        score = sum(span.score * (span.end - span.start) for span in own) / frames
        start, end = own[0].start * frame_seconds, own[-1].end * frame_seconds
        made.append(Word(word, round(start, 3), round(end, 3), round(float(torch.tensor(score).exp()), 4)))
    return made
