"""Batches of samples of like length, as many as a budget holds.

The global order is cut into windows of so many samples. Those of a window are sorted by length into batches, and its
batches shuffled. The batches of all windows, one after another, are the sequence of which step s gives number
s * world_size + r to rank r: which samples share a batch depends on no rank, and the state is a window and how many of
its batches are given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, Unpack

from .bad_samples import BadSample, LoaderError
from .mixture import Mixture
from .permutation import Permutation
from .shards import Sample
from .steps import MAX_CONSECUTIVE_BAD, Batch, Begin, Collate, LoaderOptions, Step, StepLoader

Lengths = Callable[[Sample], Sequence[int]]
"""The lengths of what is padded to the longest of a batch: of one recording, or of each picture of a sample."""


@dataclass(kw_only=True)
class BucketConfig:
    """Batches by length.

    Args:
        budget: of a batch, in the unit of the lengths: mel frames of speech, tiles of pictures, or bytes.
        window: samples sorted together. More of them leave less padding; fewer mix better.
        max_samples: of a batch; None: as many as the budget holds.
        size: of a batch, "padded": the longest times their number; "sum": all together, for batches without padding.
        by: "length" is what the stage measures. Every process opens each sample for it, headers alone being decoded,
            and then those of its own batches once more. "bytes" are the sizes of samples in their shards, for which
            nothing is read.
    """

    budget: float
    window: int = 512
    max_samples: int | None = None
    size: Literal["padded", "sum"] = "padded"
    by: Literal["length", "bytes"] = "length"

    def __post_init__(self) -> None:
        for name in ("budget", "window", "max_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class BucketLoader(StepLoader[Batch]):
    """Batches within a budget, prepared in the background; see `StepLoader`.

    Where the sources are limited, the last step may hold fewer batches than there are ranks; the last of these get
    None. A sample that alone exceeds the budget is a bad one, as is one that cannot be measured; every rank finds and
    counts those.

    Args:
        lengths: of a sample, with `ValueError` for a bad one; not needed by bytes.
        drop_last: leaves out a last step that would not give every rank a batch.

    Raises:
        ValueError: `lengths` is missing, or a source does not know the sizes of its samples.
    """

    def __init__(
        self,
        mixture: Mixture,
        collate: Collate[Batch],
        bucket: BucketConfig,
        lengths: Lengths | None = None,
        *,
        drop_last: bool = False,
        **options: Unpack[LoaderOptions],
    ):
        super().__init__(mixture, collate, **options)
        if bucket.by == "length" and lengths is None:
            raise ValueError("bucket.by 'length' needs to be told the lengths of samples; 'bytes' does not")
        for name, reader in zip(mixture.names, mixture.readers, strict=True):
            if bucket.by == "bytes" and not hasattr(reader, "size"):
                raise ValueError(f"source {name}: {type(reader).__name__} does not know the sizes of its samples")
        self.bucket, self.drop_last = bucket, drop_last
        self.lengths = lengths if bucket.by == "length" else None
        self.place = {"consumed": 0, "window": 0, "given": 0}

    def steps(self, begin: Begin) -> Iterator[Step]:
        sequence = self._sequence(begin)
        while True:
            try:
                batches = list(islice(sequence, self.world_size))
            except Exception as error:  # raised in its turn, after the batches before it
                yield Step((), self.place, failure=error)
                return
            if not batches or (self.drop_last and len(batches) < self.world_size):
                return
            mine = batches[self.rank].positions if self.rank < len(batches) else ()
            bad = [one for batch in batches for one in batch.bad]
            yield Step(mine, batches[-1].after, bad, idle=not batches[0].positions)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "bucket": asdict(self.bucket)}

    def _sequence(self, begin: Begin) -> Iterator[Step]:
        """The batches of all ranks from `place` on, each with the samples found bad on the way to it."""
        consumed, window, given = self.place["consumed"], self.place["window"], self.place["given"]
        bad: list[BadSample] = []
        plan = begin(self._plan, window)
        while plan is not None:
            batches, found = plan()
            if given == 0:  # else they have been reported
                bad += found
                consumed += len(found)
            if not batches and len(bad) >= MAX_CONSECUTIVE_BAD:
                raise LoaderError(f"{len(bad)} bad samples in a row, the last: {bad[-1]}")
            plan = None
            for number, positions in enumerate(batches[given:], given + 1):
                if plan is None and 2 * number >= len(batches):
                    plan = begin(self._plan, window + 1)
                consumed += len(positions)
                yield Step(positions, {"consumed": consumed, "window": window, "given": number}, bad)
                bad = []
            window, given = window + 1, 0
            if self.mixture.end is not None and window * self.bucket.window >= self.mixture.end:
                break
            plan = plan or begin(self._plan, window)
        if bad:
            yield Step((), {"consumed": consumed, "window": window, "given": 0}, bad)

    def _plan(self, window: int) -> tuple[list[list[int]], list[BadSample]]:
        """The positions of each batch of a window, and its samples that cannot be measured."""
        size = self.bucket.window
        stop = (window + 1) * size if self.mixture.end is None else min((window + 1) * size, self.mixture.end)
        measured = {position: self._measured(position) for position in range(window * size, stop)}
        bad = [one for one in measured.values() if isinstance(one, BadSample)]
        if bad and self.on_bad == "raise":
            raise LoaderError(str(bad[0]))
        lengths = {position: one for position, one in measured.items() if not isinstance(one, BadSample)}
        batches = within_budget(lengths, self.bucket)
        order = Permutation(len(batches), self.seed, "batches of a window", window)
        return [batches[order[i]] for i in range(len(batches))], bad

    def _measured(self, position: int) -> Sequence[int] | BadSample:
        if self.bucket.by == "bytes":
            place = self.mixture.locate(position, self.seed)
            found: Sequence[int] = [self.mixture.readers[place.source].size(place.index)]  # type: ignore[attr-defined]
            if found[0] <= self.bucket.budget:
                return found

        def measure(sample: Sample) -> None:
            nonlocal found
            if self.lengths is not None:
                found = self.lengths(sample) or [1]
            if (size := _size(found, self.bucket)) > self.bucket.budget:
                raise ValueError(f"its size of {size:,} is above the budget of a batch, {self.bucket.budget:,g}")

        tried = self.try_sample(position, measure)
        return tried if isinstance(tried, BadSample) else found


def within_budget(lengths: Mapping[int, Sequence[int]], bucket: BucketConfig) -> list[list[int]]:
    """Samples, of which each is within the budget, sorted by length into batches that are.

    Args:
        lengths: of each sample, by its position.

    Returns:
        The positions of each batch in ascending order, the batch of the shortest samples first.
    """
    batches: list[list[int]] = []
    inside: list[int] = []
    for position in sorted(lengths, key=lambda one: (max(lengths[one]), sum(lengths[one]), one)):
        together = [*inside, *lengths[position]]
        full = bucket.max_samples is not None and batches and len(batches[-1]) >= bucket.max_samples
        if not batches or full or _size(together, bucket) > bucket.budget:
            batches.append([])
            together = list(lengths[position])
        batches[-1].append(position)
        inside = together
    return [sorted(batch) for batch in batches]


def _size(lengths: Sequence[int], bucket: BucketConfig) -> int:
    return sum(lengths) if bucket.size == "sum" else max(lengths) * len(lengths)
