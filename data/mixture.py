"""Weighted sources, mixed so that any position of the endless stream can be computed on its own.

Position p belongs to a source by a fixed periodic pattern; how many positions before p belong to the same
source says which of its samples comes: draw n is number n % len of pass n // len, in that pass's permutation.
Nothing depends on what was read before, on ranks or on workers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from .permutation import permutation
from .shards import Sample

MAX_PERIOD = 1 << 16


class Source(Protocol):
    """What a mixture draws from: a `ShardReader`, or a list of samples."""

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

    The weights are taken as exact decimal fractions and normalised. Before any position n each source has
    been drawn n * weight times to within one, not only on average. That holds for `self.weights`: where the
    weights given have no common denominator up to `MAX_PERIOD` (sizes of data sets, for instance), they are
    rounded to multiples of 1 / MAX_PERIOD, and none to zero.

    Args:
        sources: (name, reader, weight) each; a name belongs to the order, so keep it when data are moved.
        drawn: how often each source, by name, had been drawn before position 0; it goes on from there. Missing: 0.

    Raises:
        ValueError: no sources, a name twice, an empty source, a weight that is not positive and finite.
    """

    def __init__(self, sources: Sequence[tuple[str, Source, float]], drawn: Mapping[str, int] | None = None):
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
        self._counts = _whole_numbers([weight for _, _, weight in sources])
        self._period = sum(self._counts)
        self.weights = [Fraction(count, self._period) for count in self._counts]
        """The share of each source, exactly as it is drawn."""
        self._pattern, self._earlier = _interleave(self._counts)
        self._drawn = [(drawn or {}).get(name, 0) for name in self.names]

    def drawn(self, position: int) -> dict[str, int]:
        """How often each source has been drawn before a position, by name."""
        period, slot = divmod(position, self._period)
        now = np.bincount(self._pattern[:slot], minlength=len(self.names))
        counts = zip(self.names, self._drawn, self._counts, now.tolist(), strict=True)
        return {name: before + period * count + here for name, before, count, here in counts}

    def locate(self, position: int, seed: int, shift: int = 0) -> Place:
        """Where the sample of a position comes from.

        Args:
            position: 0 or more.
            seed: of the permutations.
            shift: takes the sample that many places later in the same pass of the same source (cyclically).
        """
        if position < 0:
            raise IndexError(f"position must be at least 0, not {position}")
        period, slot = divmod(position, self._period)
        source = int(self._pattern[slot])
        drawn = self._drawn[source] + period * self._counts[source] + int(self._earlier[slot])
        length = len(self.readers[source])
        epoch, offset = divmod(drawn, length)
        order = permutation(length, seed, self.names[source], epoch)
        return Place(source, epoch, order[(offset + shift) % length])

    def sample(self, position: int, seed: int, shift: int = 0) -> Sample:
        """The sample of a position; arguments as for `locate`."""
        place = self.locate(position, seed, shift)
        return self.readers[place.source][place.index]

    def describe(self) -> list[dict[str, object]]:
        """What the order depends on besides the seed, as plain JSON."""
        rows = zip(self.names, self.readers, self.weights, strict=True)
        return [{"name": name, "samples": len(reader), "weight": str(w)} for name, reader, w in rows]


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Positive numbers in the ratio of the weights, of which the sum is at most MAX_PERIOD."""
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


def _interleave(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
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
    waiting = [(0, source) for source in range(len(counts))]
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
