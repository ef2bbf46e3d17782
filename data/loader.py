"""Batches in an order that is a pure function of (seed, position), so that a run can be resumed anywhere.

The global order is one endless sequence of positions. Batch s of rank r takes the positions

    start + s * batch_size * world_size + r * batch_size   and the following batch_size - 1,

where `start` is how many samples a run had consumed before: the union over the ranks is the global order, and
the state is that one number, whatever the number of ranks, workers or prefetched batches.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from .mixture import Mixture
from .shards import Sample

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Collate = Callable[[list[tuple[int, Sample]]], Batch]

MAX_CONSECUTIVE_BAD = 100


class LoaderError(ValueError):
    """A bad sample, named by shard and key, or a state that does not fit the loader."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or collated, and why."""

    position: int
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key} (position {self.position}): {self.reason}"


class Loader(Generic[Batch]):
    """Endless batches of a mixture, prepared in the background.

    `collate` turns [(position, sample), ...] into a batch. It runs in worker threads, so it must not touch
    the model; whatever it draws at random it should draw from the position. Its `ValueError`s (the errors of
    media, dialogs and shards are such) mean a bad sample; any other exception is passed on as it is. Of a
    failing batch each sample is collated alone to find the bad one.

    Args:
        batch_size: samples of this rank's batch.
        seed: of the order.
        rank, world_size: this process among those that share the order.
        prefetch: batches prepared ahead; 0 prepares each when it is asked for, without threads.
        workers: threads; decoding and resizing release Python's lock.
        on_bad: "raise" stops with a `LoaderError` that names the sample. "skip" logs and counts it in
            `self.bad` and gives its place to the next good one of its source's pass, so that ranks stay in
            step.

    Raises:
        LoaderError: see `on_bad`; with "skip", after 100 bad samples in a row. Asking again after an error
            tries the same batch again.
    """

    def __init__(
        self,
        mixture: Mixture,
        collate: Collate[Batch],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        workers: int = 1,
        on_bad: Literal["raise", "skip"] = "raise",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0 .. {world_size - 1}, not {rank}")
        if prefetch < 0 or workers < 1:
            raise ValueError(f"prefetch must be at least 0 and workers 1, not {prefetch} and {workers}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', not {on_bad!r}")
        self.mixture, self.collate, self.batch_size = mixture, collate, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.prefetch, self.workers, self.on_bad = prefetch, workers, on_bad
        self.consumed = 0
        """Samples of the global order that batches given out by all ranks have taken."""
        self.bad: list[BadSample] = []
        """The samples skipped in the batches given out, by this rank since it started."""
        self._executor: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[Batch, list[BadSample]]]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self.batch_size * self.world_size
        if self.prefetch == 0:
            batch, bad = self._prepare(self.consumed)
        else:
            if self._executor is None:
                # Workers must not compete with the model for its cores. torch keeps the number for each thread,
                # but a thread that has not asked yet would take over what another one sets.
                torch.get_num_threads()
                self._executor = ThreadPoolExecutor(
                    self.workers, "herdkit-loader", initializer=torch.set_num_threads, initargs=(1,)
                )
            while len(self._ahead) <= self.prefetch:
                start = self.consumed + len(self._ahead) * step
                self._ahead.append(self._executor.submit(self._prepare, start))
            try:
                batch, bad = self._ahead[0].result()
            except BaseException:
                self._drop_ahead()
                raise
            self._ahead.popleft()
        for sample in bad:
            logger.warning("skipped %s", sample)
        self.bad += bad
        self.consumed += step
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch given out, as plain JSON; the same on every rank."""
        return {"consumed": self.consumed, "seed": self.seed, "sources": self.mixture.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken, also with another number of ranks or another batch size.

        Raises:
            LoaderError: the seed or the sources differ, so that the order would be another one.
        """
        for name, mine in (("seed", self.seed), ("sources", self.mixture.describe())):
            if state[name] != mine:
                raise LoaderError(f"the state was taken with {name} {state[name]}, but the loader has {mine}")
        self._drop_ahead()
        self.consumed = int(state["consumed"])

    def close(self) -> None:
        """Ends the threads. Asking for another batch starts them again."""
        self._drop_ahead()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _prepare(self, start: int) -> tuple[Batch, list[BadSample]]:
        positions = range(start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size)
        try:
            samples = [(position, self.mixture.sample(position, self.seed)) for position in positions]
            return self.collate(samples), []
        except ValueError as error:
            good: list[tuple[int, Sample]] = []
            bad: list[BadSample] = []
            for position in positions:
                good.append(self._first_good(position, bad))
            if not bad:
                raise  # each sample is fine, so it is the batch that is not
            if self.on_bad == "raise":
                raise LoaderError(str(bad[0])) from error
            return self.collate(good), bad

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
