"""Where somebody speaks in a recording, and where a long one is cut: by energy, as it comes.

A frame of 10 ms counts as speech where it is louder than a level between the quiet and the loud frames around it, of
which it needs to know a little of the future and no more than some seconds of the past. So speech is found at the same
places in a file and in a stream. What becomes of it differs: a stream gives each stretch once it is over, where in a
file neighbours that fit into a segment together are joined (`find_segments`), silence between them included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES_PER_SECOND = 100
_BLOCK = 25
"""Frames that are judged together, by the same surroundings."""
_PAST, _FUTURE = 1000, 50
_EMPHASIS = 0.7


@dataclass(kw_only=True)
class SegmentConfig:
    """
    Args:
        max_seconds: of a segment. A stretch of speech that is longer is cut at its quietest frame.
        min_silence: seconds of silence that end a stretch of speech.
        min_speech: seconds of speech that a segment holds at least; less is a click.
        margin: seconds kept before and after the speech, at most half of `min_silence`.
        contrast: dB between the quiet and the loud frames of a few seconds from which on there is speech among them:
            steady noise, however loud, stays below.
        quiet: dB of full scale, of the samples' differences, below which nothing is speech.
    """

    max_seconds: float = 30.0
    min_silence: float = 0.4
    min_speech: float = 0.1
    margin: float = 0.15
    contrast: float = 7.0
    quiet: float = -75.0

    def __post_init__(self):
        if not 0 < self.min_silence <= self.max_seconds / 2:
            raise ValueError(f"min_silence ({self.min_silence}) must be above 0 and at most half of max_seconds")
        if not 0 <= self.margin <= self.min_silence / 2:
            raise ValueError(f"margin ({self.margin}) must be at least 0 and at most half of min_silence")
        for name in ("min_speech", "contrast"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class Segment:
    """Samples `start` to `end`, without `end`, of a recording, with some silence around the speech."""

    start: int
    end: int


class Segmenter:
    """Finds the segments of one recording while it comes. They do not overlap and stand in rising order; how the
    samples are handed in changes nothing."""

    def __init__(self, sample_rate: int, config: SegmentConfig | None = None):
        """
        Raises:
            ValueError: the sample rate is no multiple of 100 Hz.
        """
        if sample_rate % FRAMES_PER_SECOND:
            raise ValueError(f"sample_rate must be a multiple of {FRAMES_PER_SECOND} Hz, not {sample_rate}")
        self.config = config or SegmentConfig()
        self.hop = sample_rate // FRAMES_PER_SECOND
        self.total = 0
        self._rest = torch.zeros(0)
        self._before = torch.zeros(1)
        self._levels = torch.zeros(0)
        """dB of the frames from `_first` on."""
        self._first = 0
        self._judged = 0
        self._open: int | None = None
        self._last = 0
        self._speech = 0
        self._ended = 0

    def push(self, samples: Tensor) -> list[Segment]:
        """Takes further samples (n,) and gives the segments that are over."""
        self.total += len(samples)
        samples = torch.cat((self._before, samples.detach().cpu().float()))
        self._before = samples[-1:]
        # Noise of rooms and winds rises and falls below where speech is.
        joined = torch.cat((self._rest, samples[1:] - _EMPHASIS * samples[:-1]))
        count = len(joined) // self.hop
        self._rest = joined[count * self.hop :]
        power = joined[: count * self.hop].view(count, self.hop).square().mean(dim=1)
        self._levels = torch.cat((self._levels, 10 * power.clamp_min(1e-12).log10()))
        return list(self._segments(final=False))

    def finish(self) -> list[Segment]:
        """The segments that are left at the end of the recording."""
        found = list(self._segments(final=True))
        if self._open is not None:
            found += self._close(self._last + 1, self._margin)
        return found

    def _segments(self, final: bool) -> Iterator[Segment]:
        known = self._first + len(self._levels)
        while self._judged + (1 if final else _BLOCK + _FUTURE) <= known:
            stop = min(self._judged + _BLOCK, known)
            speech = self._is_speech(self._judged, stop)
            for frame, spoken in zip(range(self._judged, stop), speech.tolist(), strict=True):
                yield from self._frame(frame, spoken)
            self._judged = stop
            needed = min(self._judged - _PAST, self._judged if self._open is None else self._open)
            if needed - self._first > 10 * _PAST:
                self._levels, self._first = self._levels[needed - self._first :], needed

    def _is_speech(self, start: int, stop: int) -> Tensor:
        around = self._levels[max(start - _PAST - self._first, 0) : stop + _FUTURE - self._first]
        low, high = around.quantile(torch.tensor([0.1, 0.95])).tolist()
        if high - low < self.config.contrast:
            return torch.zeros(stop - start, dtype=torch.bool)
        # Speech falls off slowly: nearer to the noise than to the loud vowels.
        level = max(low + 0.3 * (high - low), high - 40, self.config.quiet)
        return self._levels[start - self._first : stop - self._first] > level

    def _frame(self, frame: int, spoken: bool) -> Iterator[Segment]:
        config = self.config
        if spoken:
            if self._open is None:
                self._open, self._speech = frame, 0
            self._last, self._speech = frame, self._speech + 1
        elif self._open is not None and frame - self._last >= round(config.min_silence * FRAMES_PER_SECOND):
            yield from self._close(self._last + 1, self._margin)
            self._open = None
        most = math.floor((config.max_seconds - 2 * config.margin) * FRAMES_PER_SECOND)
        if self._open is not None and frame - self._open + 1 >= most:
            late = self._open + 2 * most // 3
            cut = late + int(self._levels[late - self._first : frame + 1 - self._first].argmin())
            yield from self._close(cut, 0)
            self._open, self._speech = cut, max(self._last + 1 - cut, 0)

    @property
    def _margin(self) -> int:
        return round(self.config.margin * FRAMES_PER_SECOND)

    def _close(self, end: int, margin: int) -> list[Segment]:
        """The open stretch up to `margin` frames after the frame `end`, if it is more than a click."""
        assert self._open is not None
        if self._speech < self.config.min_speech * FRAMES_PER_SECOND:
            return []
        start = max((self._open - self._margin) * self.hop, self._ended)
        self._ended = min((end + margin) * self.hop, self.total)
        return [Segment(start, self._ended)]


def find_segments(waveform: Tensor, sample_rate: int, config: SegmentConfig | None = None) -> list[Segment]:
    """The segments of a whole recording (samples,); neighbours that fit into `max_seconds` together are one."""
    segmenter, found = Segmenter(sample_rate, config), []
    # In pieces, since the segmenter makes copies of what it is given.
    for minute in waveform.split(60 * sample_rate):
        found += segmenter.push(minute)
    found += segmenter.finish()
    return joined(found, segmenter.config.max_seconds * sample_rate)


def joined(segments: list[Segment], most: float) -> list[Segment]:
    """Neighbours as one where that has at most so many samples."""
    made: list[Segment] = []
    for segment in segments:
        if made and segment.end - made[-1].start <= most:
            made[-1] = Segment(made[-1].start, segment.end)
        else:
            made.append(segment)
    return made
