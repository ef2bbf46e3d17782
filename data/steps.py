"""What all loaders share: the steps of an order, prepared ahead in threads, handed out in turn and counted.

A loader says which positions of the global order each step of this rank takes, and which place of the order comes
after it. That place is the whole state: what was prepared ahead but not handed out has left no trace in it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, Required, TypedDict, TypeVar

import torch

from .bad_samples import BadSample, LoaderError
from .mixture import Mixture
from .shards import Sample

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Collate = Callable[[list[tuple[int, Sample]]], Batch]

MAX_CONSECUTIVE_BAD = 100


class LoaderOptions(TypedDict, total=False):
    """What every loader takes.

    Args:
        seed: of the order.
        rank, world_size: this process among those that share the order.
        prefetch: batches prepared ahead; 0 prepares each when it is asked for, without threads. Default: 2.
        workers: threads; decoding and resizing release Python's lock. Default: 1.
        on_bad: "raise", the default, stops with a `LoaderError` that names the sample. "skip" logs and counts it in
            `bad` and gives its place to the next good one of its source's pass, so that ranks stay in step.
    """

    seed: Required[int]
    rank: int
    world_size: int
    prefetch: int
    workers: int
    on_bad: Literal["raise", "skip"]


@dataclass(frozen=True)
class Step:
    """What this rank gets in a step: the samples of some positions, or of none where none is left for it.

    Args:
        after: the place of the order once every rank has had its part.
    """

    positions: Sequence[int]
    after: dict[str, int]


@dataclass(frozen=True)
class Prepared(Generic[Batch]):
    """A step whose batch is ready; `batch` is None where the step has no positions."""

    batch: Batch | None
    bad: list[BadSample]
    after: dict[str, int]


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
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        workers: int = 1,
        on_bad: Literal["raise", "skip"] = "raise",
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0 .. {world_size - 1}, not {rank}")
        if prefetch < 0 or workers < 1:
            raise ValueError(f"prefetch must be at least 0 and workers 1, not {prefetch} and {workers}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', not {on_bad!r}")
        self.mixture, self.collate = mixture, collate
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.prefetch, self.workers, self.on_bad = prefetch, workers, on_bad
        self.bad: list[BadSample] = []
        """The samples skipped in the batches given out, by this rank since it started."""
        self._executor: ThreadPoolExecutor | None = None
        self._stream: Generator[Prepared[Batch]] | None = None

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """The steps of this rank that follow `place`."""

    @property
    def consumed(self) -> int:
        """Samples of the global order that batches given out by all ranks have taken."""
        return self.place["consumed"]

    def __iter__(self) -> Iterator[Batch | None]:
        return self

    def __next__(self) -> Batch | None:
        if self._stream is None:
            self._stream = self.prepared(self.prefetch)
        try:
            ready = next(self._stream)
            self.hand_out(ready)
        except BaseException:
            self._drop_ahead()
            raise
        return ready.batch

    def prepared(self, prefetch: int, first: int = 0, every: int = 1) -> Generator[Prepared[Batch]]:
        """What follows `place`, none of it counted as handed out yet.

        Args:
            prefetch: steps prepared ahead in threads; 0: none, and no threads.
            first, every: only each so many-th step, for one of several processes that prepare in turn.
        """
        steps = islice(self.steps(), first, None, every)
        if prefetch == 0:
            yield from map(self._prepare, steps)
            return
        ahead: deque[Future[Prepared[Batch]]] = deque()
        try:
            for step in steps:
                ahead.append(self._threads().submit(self._prepare, step))
                if len(ahead) > prefetch:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def hand_out(self, ready: Prepared[Batch]) -> None:
        """Counts a step as handed out."""
        for sample in ready.bad:
            logger.warning("skipped %s", sample)
        self.bad += ready.bad
        self.place = ready.after

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch given out, as plain JSON; the same on every rank."""
        return {**self.place, "seed": self.seed, "sources": self.mixture.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken, also with another number of ranks or another batch size.

        Raises:
            LoaderError: the seed or the sources differ, so that the order would be another one.
        """
        for name, mine in (("seed", self.seed), ("sources", self.mixture.describe())):
            if state[name] != mine:
                raise LoaderError(f"the state was taken with {name} {state[name]}, but the loader has {mine}")
        self._drop_ahead()
        self.place = {name: int(state[name]) for name in self.place}

    def close(self) -> None:
        """Ends the threads. Asking for another batch starts them again."""
        self._drop_ahead()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _drop_ahead(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None:
            # Workers must not compete with the model for its cores. torch keeps the number for each thread,
            # but a thread that has not asked yet would take over what another one sets.
            torch.get_num_threads()
            self._executor = ThreadPoolExecutor(
                self.workers, "herdkit-loader", initializer=torch.set_num_threads, initargs=(1,)
            )
        return self._executor

    def _prepare(self, step: Step) -> Prepared[Batch]:
        if not step.positions:
            return Prepared(None, [], step.after)
        try:
            samples = [(position, self.mixture.sample(position, self.seed)) for position in step.positions]
            return Prepared(self.collate(samples), [], step.after)
        except ValueError as error:
            good: list[tuple[int, Sample]] = []
            bad: list[BadSample] = []
            for position in step.positions:
                good.append(self._first_good(position, bad))
            if not bad:
                raise  # each sample is fine, so it is the batch that is not
            if self.on_bad == "raise":
                raise LoaderError(str(bad[0])) from error
            return Prepared(self.collate(good), bad, step.after)

    def _first_good(self, position: int, bad: list[BadSample]) -> tuple[int, Sample]:
        for shift in range(MAX_CONSECUTIVE_BAD):
            shard, key = "", ""
            try:
                sample = self.mixture.sample(position, self.seed, shift)
                shard, key = sample.shard, sample.key
                self.collate([(position, sample)])
                return position, sample
            except ValueError as error:
                place = self.mixture.locate(position, self.seed, shift)
                shard, key = shard or self.mixture.names[place.source], key or str(place.index)
                bad.append(BadSample(position, shard, key, str(error)))
        raise LoaderError(f"{MAX_CONSECUTIVE_BAD} bad samples in a row, the last: {bad[-1]}")
