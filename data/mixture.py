"""Weighted sources, mixed so that any position of the stream can be computed on its own.

Position p belongs to a source by a fixed periodic pattern; how many positions before p belong to the same source says
which of its samples comes: draw n is number n % len of pass n // len, in that pass's permutation. Where a source has
been drawn as often as it may, a new segment begins, with the pattern of those that are left. Nothing depends on what
was read before, on ranks or on workers.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np

from .permutation import permutation
from .shards import Fault, Sample

MAX_PERIOD = 1 << 16


class Source(Protocol):
    """What a mixture draws from: a `ShardReader`, or a list of samples. It may have `faults`, as the reader does."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Sample: ...


@dataclass(frozen=True)
class Place:
    """Where the sample of a position comes from: sample `index` of source `source`, in its pass `epoch`."""

    source: int
    epoch: int
    index: int


class Mixture:
    """Sources with weights; also one source alone.

    The weights are taken as exact decimal fractions and normalised. Before any position n each source has been drawn
    n * weight times to within one, not only on average. That holds for `self.weights`: where the weights given have no
    common denominator up to `MAX_PERIOD` (sizes of data sets, for instance), they are rounded to multiples of
    1 / MAX_PERIOD, and none to zero. A source that may not be drawn again leaves its share to the others, which go on
    with their weights, exactly again from there on.

    Args:
        sources: (name, reader, weight) each; a name belongs to the order, so keep it when data are moved.
        drawn: how often each source, by name, had been drawn before position 0; it goes on from there. Missing: 0.
        epochs: at most so many passes of a source, by name, those before position 0 included; 2.5 are two and the first
            half of the third, rounded down to whole samples. Missing or None: no limit.

    Raises:
        ValueError: no sources, a name twice, an empty source, a weight that is not positive and finite, epochs that
            hold no sample.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Source, float]],
        drawn: Mapping[str, int] | None = None,
        epochs: Mapping[str, float | Fraction | None] | None = None,
    ):
        if not sources:
            raise ValueError("a mixture needs at least one source")
        self.names = [name for name, _, _ in sources]
        self.readers = [reader for _, reader, _ in sources]
        for name, reader, weight in sources:
            if self.names.count(name) > 1:
                raise ValueError(f"source {name}: the name is used twice")
            if len(reader) == 0:
                raise ValueError(f"source {name}: holds no samples")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"source {name}: the weight must be positive, not {weight}")
        self._lengths = [len(reader) for reader in self.readers]
        self._given = [weight for _, _, weight in sources]
        self._limits = [_limit((epochs or {}).get(name), len(reader), name) for name, reader, _ in sources]
        before = [(drawn or {}).get(name, 0) for name in self.names]
        self._segments = [self._segment(0, before)]
        self.weights = [Fraction(count, max(1, len(self._segments[0].pattern))) for count in self._segments[0].counts]
        """The share of each source, exactly as it is drawn before any has come to its end."""
        left = [max(0, limit - n) for limit, n in zip(self._limits, before, strict=True) if limit is not None]
        self.end = sum(left) if len(left) == len(sources) else None
        """How many positions there are; None: without end."""
        self.before = sum(before)
        """Draws before position 0."""

    @property
    def faults(self) -> list[Fault]:
        """What is damaged in the sources' shards and left out."""
        return [fault for reader in self.readers for fault in getattr(reader, "faults", ())]

    def drawn(self, position: int) -> dict[str, int]:
        """How often each source has been drawn before a position, by name."""
        return dict(zip(self.names, self._at(position).drawn_before(position), strict=True))

    def locate(self, position: int, seed: int, shift: int = 0) -> Place:
        """Where the sample of a position comes from.

        Args:
            position: 0 or more, and below `self.end`.
            seed: of the permutations.
            shift: takes the sample that many places later in the same pass of the same source (cyclically).
        """
        if position < 0 or (self.end is not None and position >= self.end):
            raise IndexError(f"position {position} is outside 0 .. {'' if self.end is None else self.end - 1}")
        segment = self._at(position)
        period, slot = divmod(position - segment.start, len(segment.pattern))
        source = int(segment.pattern[slot])
        drawn = segment.drawn[source] + period * segment.counts[source] + int(segment.earlier[slot])
        length = self._lengths[source]
        epoch, offset = divmod(drawn, length)
        order = permutation(length, seed, self.names[source], epoch)
        return Place(source, epoch, order[(offset + shift) % length])

    def sample(self, position: int, seed: int, shift: int = 0) -> Sample:
        """The sample of a position; arguments as for `locate`."""
        place = self.locate(position, seed, shift)
        return self.readers[place.source][place.index]

    def describe(self) -> list[dict[str, object]]:
        """What the order depends on besides the seed, as plain JSON."""
        rows = zip(self.names, self._lengths, self.weights, self._limits, strict=True)
        return [{"name": name, "samples": n, "weight": str(w), "limit": limit} for name, n, w, limit in rows]

    def _at(self, position: int) -> _Segment:
        segments = self._segments
        while (last := segments[-1]).end is not None and position >= last.end and any(last.counts):
            segments = [*segments, self._segment(last.end, last.drawn_before(last.end))]
            self._segments = segments  # whole at any moment, since threads share it
        return last if position >= last.start else segments[bisect_right(segments, position, key=_start) - 1]

    def _segment(self, start: int, drawn: list[int]) -> _Segment:
        """What follows from a position on, before which each source had been drawn so often."""
        left = [None if limit is None else max(0, limit - n) for limit, n in zip(self._limits, drawn, strict=True)]
        active = [source for source, n in enumerate(left) if n != 0]
        counts = [0] * len(drawn)
        for source, count in zip(active, _whole_numbers([self._given[source] for source in active]), strict=True):
            counts[source] = count
        pattern, earlier = _interleave(tuple(counts))
        end = None if active else start
        for source in active:
            if (n := left[source]) is not None:
                period, number = divmod(n - 1, counts[source])
                slot = int(np.flatnonzero(pattern == source)[number])
                ends = start + period * len(pattern) + slot + 1
                end = ends if end is None else min(end, ends)
        return _Segment(start, end, drawn, counts, pattern, earlier)


@dataclass(frozen=True)
class _Segment:
    """Positions start .. end - 1, over which the same sources are drawn.

    Args:
        end: None: without end.
        drawn: how often each source had been drawn before `start`.
        counts: slots of each source in a period.
        pattern: which source each slot of a period belongs to, earlier: and how many earlier slots it has there.
    """

    start: int
    end: int | None
    drawn: list[int]
    counts: list[int]
    pattern: np.ndarray
    earlier: np.ndarray

    def drawn_before(self, position: int) -> list[int]:
        if not any(self.counts):
            return self.drawn
        period, slot = divmod(position - self.start, len(self.pattern))
        now = np.bincount(self.pattern[:slot], minlength=len(self.counts)).tolist()
        parts = zip(self.drawn, self.counts, now, strict=True)
        return [before + period * count + here for before, count, here in parts]


def _start(segment: _Segment) -> int:
    return segment.start


def _limit(epochs: float | Fraction | None, length: int, name: str) -> int | None:
    """The most draws of a source of so many samples."""
    if epochs is None:
        return None
    if not (epochs > 0 and math.isfinite(epochs)) or (draws := int(Fraction(str(epochs)) * length)) == 0:
        raise ValueError(f"source {name}: {epochs} epochs of {length} samples hold no sample; leave the source out")
    return draws


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Positive numbers in the ratio of the weights, of which the sum is at most MAX_PERIOD."""
    if not weights:
        return []
    if len(weights) > MAX_PERIOD:
        raise ValueError(f"{len(weights)} sources; the limit is {MAX_PERIOD}")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    total = sum(whole)
    if total <= MAX_PERIOD:
        return whole
    shares = [Fraction(number * MAX_PERIOD, total) for number in whole]
    rounded = [max(1, math.floor(share)) for share in shares]
    # The largest remainders are rounded up; those lifted from zero to one have had theirs.
    by_remainder = sorted(range(len(shares)), key=lambda i: (rounded[i] - shares[i], i))
    for i in by_remainder[: max(0, MAX_PERIOD - sum(rounded))]:
        rounded[i] += 1
    return rounded


@lru_cache(maxsize=64)
def _interleave(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period of the pattern: which source each slot belongs to, and how many earlier slots it has there.

    The j-th draw of a source of weight w keeps |drawn - n * w| < 1 at every n exactly if it falls into the
    slots floor((j - 1) / w) .. ceil(j / w) - 1. Giving each slot to the draw whose slots have begun and end
    first finds such an order if there is one (unit jobs on one machine). There is one: to draw the fraction w
    of each source in every slot is a fractional solution of a flow problem with whole bounds.
    """
    period = sum(counts)
    pattern = np.empty(period, np.int32)
    earlier = np.empty(period, np.int32)
    drawn = [0] * len(counts)
    waiting = [(0, source) for source, count in enumerate(counts) if count]
    ready: list[tuple[int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(drawn[source] + 1) * period // counts[source]), source))
        source = heapq.heappop(ready)[1]
        pattern[slot], earlier[slot] = source, drawn[source]
        drawn[source] += 1
        if drawn[source] < counts[source]:
            heapq.heappush(waiting, (drawn[source] * period // counts[source], source))
    return pattern, earlier
