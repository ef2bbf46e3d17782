"""What all loaders share: the steps of an order, prepared ahead in threads, handed out in turn and counted.

A loader says which positions of the global order each step of this rank takes, and which place of the order comes
after it. That place is the whole state: what was prepared ahead but not handed out has left no trace in it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import torch

from .bad_samples import BadSample, LoaderError, check_budget
from .mixture import Mixture
from .shards import Fault, Sample

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Collate = Callable[[list[tuple[int, Sample]]], Batch]
Begin = Callable[..., Callable[[], Any]]
"""Called with a function and its arguments, it lets the function begin, in a thread or not until its result is wanted,
and returns what waits for that."""

MAX_CONSECUTIVE_BAD = 100


class LoaderOptions(TypedDict, total=False):
    """What every loader takes.

    Args:
        seed: of the order. Default: 0.
        rank, world_size: this process among those that share the order.
        prefetch: batches prepared ahead; 0 prepares each when it is asked for, without threads. Default: 2.
        workers: threads; decoding and resizing release Python's lock. Default: 1.
        on_bad: "raise", the default, stops with a `LoaderError` that names the sample. "skip" logs it, puts it into
            `bad` and leaves it out, so that the batch is smaller. Where nothing of the batch would be left, the next
            good sample of the source's pass takes the place, so that ranks stay in step; it comes again in its turn.
        max_bad: with "skip", at most so many bad samples, or, below 1, such a share of the samples consumed (of the
            first thousand until those are); then a `LoaderError` that lists the last ones. It counts what `bad_count`
            does. Default: any number.
    """

    seed: int
    rank: int
    world_size: int
    prefetch: int
    workers: int
    on_bad: Literal["raise", "skip"]
    max_bad: float | None


@dataclass(frozen=True)
class Step:
    """What this rank gets in a step: the samples of some positions, or of none where none is left for it.

    Args:
        after: the place of the order once every rank has had its part.
        bad: samples that are known to be bad already, and have no position here.
        failure: raised in place of a batch.
        idle: no rank gets a batch; the step only tells of bad samples, and nobody is given anything.
    """

    positions: Sequence[int]
    after: dict[str, int]
    bad: Sequence[BadSample] = ()
    failure: Exception | None = None
    idle: bool = False


class Prepared(NamedTuple, Generic[Batch]):
    """A step whose batch is ready; `batch` is None where the step has no positions."""

    step: Step
    batch: Batch | None
    bad: list[BadSample]


class StepLoader(ABC, Generic[Batch]):
    """An iterator over the batches of this rank, and the state that follows the last one handed out.

    `collate` turns [(position, sample), ...] into a batch. It runs in worker threads, so it must not touch the model;
    whatever it draws at random it should draw from the position. Its `ValueError`s (the errors of media, dialogs and
    shards are such) mean a bad sample; any other exception is passed on as it is. Of a failing batch each sample is
    collated alone to find the bad one.

    Who trains must take part in every step: in the last one of a limited mixture a rank for which no sample is left
    gets None in place of a batch, and adds nothing to the sums over ranks.

    Raises:
        LoaderError: see `LoaderOptions`; with "skip", after 100 bad samples in a row. Asking again after an error tries
            the same batch again.
    """

    place: dict[str, int]
    """Where the order stands after the last batch handed out; the whole state."""

    def __init__(
        self,
        mixture: Mixture,
        collate: Collate[Batch],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        workers: int = 1,
        on_bad: Literal["raise", "skip"] = "raise",
        max_bad: float | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0 .. {world_size - 1}, not {rank}")
        if prefetch < 0 or workers < 1:
            raise ValueError(f"prefetch must be at least 0 and workers 1, not {prefetch} and {workers}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', not {on_bad!r}")
        if max_bad is not None and (max_bad < 0 or on_bad == "raise"):
            raise ValueError(f"max_bad must be at least 0, and on_bad 'skip', not {max_bad} and {on_bad!r}")
        self.mixture, self.collate = mixture, collate
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.prefetch, self.workers, self.on_bad, self.max_bad = prefetch, workers, on_bad, max_bad
        self.bad: list[BadSample] = []
        """The samples left out of the batches handed out, by this rank since it started."""
        self.bad_elsewhere = 0
        """How many were left out before, by the state loaded. Who hears of other ranks' adds those."""
        self._executor: ThreadPoolExecutor | None = None
        self._stream: Generator[Prepared[Batch]] | None = None

    @abstractmethod
    def steps(self, begin: Begin) -> Iterator[Step]:
        """The steps of this rank that follow `place`; `begin` is for what can be prepared for later ones."""

    def identity(self) -> dict[str, Any]:
        """What the order depends on, as plain JSON."""
        return {"seed": self.seed, "sources": self.mixture.describe(), "bucket": None}

    @property
    def consumed(self) -> int:
        """Samples of the global order that batches given out by all ranks have taken."""
        return self.place["consumed"]

    @property
    def faults(self) -> list[Fault]:
        """What is damaged in the shards and left out of the order."""
        return self.mixture.faults

    @property
    def bad_count(self) -> int:
        """Bad samples of the run, as far as this rank knows: its own and those `bad_elsewhere`."""
        return len(self.bad) + self.bad_elsewhere

    def __iter__(self) -> Iterator[Batch | None]:
        return self

    def __next__(self) -> Batch | None:
        if self._stream is None:
            self._stream = self.prepared(self.prefetch)
        try:
            while True:
                ready = next(self._stream)
                self.hand_out(ready)
                if not ready.step.idle:
                    return ready.batch
        except BaseException:
            self._drop_ahead()
            raise

    def prepared(self, prefetch: int, first: int = 0, every: int = 1) -> Generator[Prepared[Batch]]:
        """What follows `place`, none of it counted as handed out yet.

        Args:
            prefetch: steps prepared ahead in threads; 0: none, and no threads.
            first, every: only each so many-th step, for one of several processes that prepare in turn.
        """
        begin: Begin = self._in_thread if prefetch else partial
        ahead: deque[Callable[[], Prepared[Batch]]] = deque()
        for step in islice(self.steps(begin), first, None, every):
            ahead.append(begin(self._prepare, step))
            if len(ahead) > prefetch:
                yield ahead.popleft()()
        while ahead:
            yield ahead.popleft()()

    def hand_out(self, ready: Prepared[Batch]) -> None:
        """Counts a step as handed out, unless that is one bad sample too many."""
        self.report(ready)
        self.place = ready.step.after

    def report(self, ready: Prepared[Batch]) -> None:
        """Logs and counts the bad samples of a step."""
        for sample in ready.bad:
            logger.warning("left out %s", sample)
        count, consumed = self.bad_count + len(ready.bad), self.mixture.before + ready.step.after["consumed"]
        check_budget(self.max_bad, count, consumed, self.bad[-5:] + ready.bad)
        self.bad += ready.bad

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch handed out, as plain JSON; the same on every rank, but for the bad samples
        of other ranks that this one has not heard of."""
        return {**self.place, "bad": self.bad_count, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken, also with another number of ranks or another batch size.

        Raises:
            LoaderError: the seed or the sources differ, so that the order would be another one.
        """
        for name, mine in self.identity().items():
            if (theirs := state.get(name)) != mine:
                raise LoaderError(f"the state was taken with {name} {theirs}, but the loader has {mine}")
        self._drop_ahead()
        self.place = {name: int(state[name]) for name in self.place}
        self.bad, self.bad_elsewhere = [], int(state["bad"])

    def close(self) -> None:
        """Ends the threads. Asking for another batch starts them again."""
        self._drop_ahead()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without threads and what they have prepared."""
        return {**vars(self), "_executor": None, "_stream": None}

    def _drop_ahead(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        if self._executor is None:
            # Workers must not compete with the model for its cores. torch keeps the number for each thread,
            # but a thread that has not asked yet would take over what another one sets.
            torch.get_num_threads()
            self._executor = ThreadPoolExecutor(
                self.workers, "herdkit-loader", initializer=torch.set_num_threads, initargs=(1,)
            )
        return self._executor.submit(function, *arguments).result

    def _prepare(self, step: Step) -> Prepared[Batch]:
        if step.failure is not None:
            raise step.failure
        if not step.positions:
            return Prepared(step, None, list(step.bad))
        try:
            samples = [(position, self.mixture.sample(position, self.seed)) for position in step.positions]
            return Prepared(step, self.collate(samples), list(step.bad))
        except ValueError as error:
            tried = [self._collated(position) for position in step.positions]
            bad = [one for one in tried if isinstance(one, BadSample)]
            good = [one for one in tried if not isinstance(one, BadSample)]
            if not bad:
                raise  # each sample is fine, so it is the batch that is not
            if self.on_bad == "raise":
                raise LoaderError(str(bad[0])) from error
            if not good:
                good = [self._stand_in(step.positions[0], bad)]
            return Prepared(step, self.collate(good), [*step.bad, *bad])

    def try_sample(self, position: int, check: Callable[[Sample], object], shift: int = 0) -> Sample | BadSample:
        """The sample of a position, if it can be read and the check raises no `ValueError`; `shift` as in
        `Mixture.locate`."""
        place = self.mixture.locate(position, self.seed, shift)
        sample = Sample(str(place.index), self.mixture.names[place.source], {})
        try:
            sample = self.mixture.readers[place.source][place.index]
            check(sample)
        except ValueError as error:
            return BadSample.of(position, sample, error)
        return sample

    def _collated(self, position: int, shift: int = 0) -> tuple[int, Sample] | BadSample:
        tried = self.try_sample(position, lambda sample: self.collate([(position, sample)]), shift)
        return tried if isinstance(tried, BadSample) else (position, tried)

    def _stand_in(self, position: int, bad: list[BadSample]) -> tuple[int, Sample]:
        for shift in range(1, MAX_CONSECUTIVE_BAD):
            tried = self._collated(position, shift)
            if not isinstance(tried, BadSample):
                return tried
            bad.append(tried)
        raise LoaderError(f"{MAX_CONSECUTIVE_BAD} bad samples in a row, the last: {bad[-1]}")
