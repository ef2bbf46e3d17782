"""Rows for pre-training: documents packed into full rows, so many rows an update, both by tokens seen.

Documents come in the order of their mixture and are packed a window at a time: a window is so many documents, tokenised
and laid into as few rows as hold them, best fit first. The rows of all windows one after another are the order of the
run; micro-batches take them in turn, whatever the number of processes. The state is a place in the documents, a few
numbers, and how many rows of the window at hand are given out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..data.bad_samples import BadSample, LoaderError
from ..data.loader import Loader
from ..data.mixture import Mixture
from ..data.packing import pack
from ..data.shards import Fault, Sample
from ..data.sources import DataConfig, epoch_limits, open_sources, source_names
from ..train.config import BatchChange, TrainerConfig
from .rows import Document, TokenBatch, lay_out

Encode = Callable[[Sequence[Sample]], list[list[int]]]


@dataclass(kw_only=True)
class Phase:
    """What changes in a pre-training run from so many tokens on (sections 3.4.1, 3.1.2); what is not given stays.

    Args:
        from_tokens: positions of rows in the updates before, padding included; the first update at or past them begins
            the phase.
        row_length: positions of a row.
        batch_size: rows of an update. accumulate: micro-batches of it on each process.
        weights: of sources, by name; a source of weight 0 is left out. They hold for the windows read from then on:
            what is left of the window at hand still comes.
    """

    from_tokens: float
    row_length: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with everything filled in: its first update, its rows, and the weight of every source by name."""

    from_step: int
    row_length: int
    batch_size: int
    accumulate: int
    weights: dict[str, float]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.row_length

    def micro_batch_size(self, groups: int) -> int:
        """Rows of a micro-batch on one of `groups` processes, or groups of devices, that take rows of their own.

        Raises:
            ValueError: batch_size does not divide evenly.
        """
        if self.batch_size % (self.accumulate * groups):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of accumulate x processes = "
                f"{self.accumulate} x {groups}"
            )
        return self.batch_size // (self.accumulate * groups)


def plan_phases(phases: Sequence[Phase], trainer: TrainerConfig, data: DataConfig) -> list[PlannedPhase]:
    """When each phase begins, which follows from those before it. The first is what `trainer` and `data` say.

    Raises:
        ValueError: phases that are not in ascending order, that begin with the same update, or that name a source
            which `data` has not or leave none; trainer.ramp beside phases.
    """
    if trainer.ramp:
        raise ValueError("trainer.ramp: this stage makes it from 'phases'; give those")
    names = source_names(data.sources)
    weights = dict(zip(names, (source.weight for source in data.sources), strict=True))
    planned = [PlannedPhase(0, data.row_length, trainer.batch_size, trainer.accumulate, weights)]
    tokens = 0
    for i, phase in enumerate(phases):
        where, before = f"phases[{i}]", planned[-1]
        if unknown := set(phase.weights) - set(names):
            raise ValueError(f"{where}.weights: no source is named {min(unknown)!r}; there are {', '.join(names)}")
        steps = math.ceil((phase.from_tokens - tokens) / before.tokens_per_step)
        if steps < 1:
            raise ValueError(
                f"{where}.from_tokens {phase.from_tokens:g} must be above {tokens:,}, where the phase before begins"
            )
        tokens += steps * before.tokens_per_step
        weights = before.weights | phase.weights
        if not any(weights.values()):
            raise ValueError(f"{where}.weights leave no source")
        planned.append(
            PlannedPhase(
                before.from_step + steps,
                phase.row_length or before.row_length,
                phase.batch_size or before.batch_size,
                phase.accumulate or before.accumulate,
                weights,
            )
        )
    return planned


def with_ramp(trainer: TrainerConfig, phases: Sequence[PlannedPhase]) -> TrainerConfig:
    """The trainer's config with the batch sizes of the phases."""
    ramp = [BatchChange(from_step=p.from_step, batch_size=p.batch_size, accumulate=p.accumulate) for p in phases[1:]]
    return dataclasses.replace(trainer, ramp=ramp)


class RowLoader:
    """Micro-batches of packed rows for a trainer with the batch sizes of the same phases.

    When a phase begins, the documents of the window at hand that no batch has had are packed again, into rows of its
    length, and come first. Where the sources are limited, the last micro-batch shares out what is left: a process may
    get fewer rows, or None (see `herdkit.data.loader`).

    Args:
        data: sources, seed, and what to do with bad samples; its row length and weights are those of the first phase.
        phases: from `plan_phases`.
        encode: samples to token ids, one list for each; runs in a worker thread. Its `ValueError` means a bad sample.
        pad_id: token of the padding.
        window: documents packed together. More of them leave less padding.
        rank, world_size: this process, or group of processes, among those that share the order.
        fill: what the last micro-batch lacks is made up by rows of padding, so that every process has as many.

    Raises:
        ValueError: there are no sources, or a batch size that does not divide evenly among processes and micro-batches.
        ShardError, LoaderError: see `herdkit.data.loader.Loader`.
    """

    def __init__(
        self,
        data: DataConfig,
        phases: Sequence[PlannedPhase],
        encode: Encode,
        pad_id: int,
        *,
        window: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        fill: bool = False,
    ):
        for phase in phases:
            phase.micro_batch_size(world_size)
        if data.bucket is not None:
            raise ValueError("data.bucket: documents are packed into rows of one length; leave it out")
        self.data, self.phases, self.encode, self.pad_id, self.window = data, phases, encode, pad_id, window
        self.rank, self.world_size, self.fill = rank, world_size, fill
        self.readers = open_sources(data)
        self.step, self.micro = 0, 0
        """Updates whose micro-batches have all been given out, and micro-batches of the next one that have."""
        self._open(0, {})

    def __iter__(self) -> Iterator[TokenBatch | None]:
        return self

    def __next__(self) -> TokenBatch | None:
        following = self._read_in + len(self._given)
        if following < len(self.phases) and self.phases[following].from_step <= self.step:
            self._begin(following)
        phase = self.phases[self._read_in + len(self._given) - 1]
        size = phase.micro_batch_size(self.world_size) * self.world_size
        taken = list(islice(self._following_rows(), size))
        if not taken:
            raise StopIteration
        if self.fill:
            taken += [[] for _ in range(size - len(taken))]
        self.micro += 1
        if self.micro == phase.accumulate:
            self.step, self.micro = self.step + 1, 0
        start, stop = (len(taken) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return lay_out(taken[start:stop], self.pad_id, phase.row_length) if start < stop else None

    @property
    def consumed(self) -> int:
        """Documents read for what has been given out, those of the window at hand included."""
        return sum(self._drawn_so_far().values())

    @property
    def bad(self) -> list[BadSample]:
        """The documents left out since the loader started, which are the same on every process."""
        return self._windows.bad

    @property
    def faults(self) -> list[Fault]:
        """What is damaged in the shards and left out of the order."""
        return [fault for reader in self.readers.values() for fault in reader.faults]

    @property
    def bad_count(self) -> int:
        """How many were left out in the whole run."""
        return self._windows.bad_count

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, the same on every rank: how to read the window at hand ("phase" is the one that it was read in),
        and how many of its rows have been given out in that phase and in each that has begun since."""
        return {
            "step": self.step,
            "micro": self.micro,
            "phase": self._read_in,
            "drawn": self._drawn,
            "window": self._before,
            "window_size": self.window,
            "given": list(self._given),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken, also with another number of processes.

        Raises:
            LoaderError: the seed, the sources or the window differ.
        """
        if state["window_size"] != self.window:
            raise LoaderError(f"the state was taken with windows of {state['window_size']}, not {self.window}")
        self.step, self.micro = state["step"], state["micro"]
        self._open(state["phase"], state["drawn"])
        self._windows.load_state_dict(state["window"])
        self._before = state["window"]
        if state["given"] != [0]:
            self._read_window()
            self._windows.bad, self._windows.bad_elsewhere = [], self._windows.bad_count  # reported when first read
        for number, given in enumerate(state["given"]):
            if number > 0:
                self._begin(self._read_in + number)
            self._given[-1] = given

    def close(self) -> None:
        self._windows.close()

    def _open(self, number: int, drawn: dict[str, int]) -> None:
        """Begins to read in a phase, at the documents that follow those drawn."""
        bad = ([], 0)
        if hasattr(self, "_windows"):
            bad = self._windows.bad, self._windows.bad_elsewhere
            self._windows.close()
        phase = self.phases[number]
        parts = [(name, reader, phase.weights[name]) for name, reader in self.readers.items() if phase.weights[name]]
        # One position of the mixture after another, whatever the process: each packs all and takes its own rows.
        self._windows = Loader(
            Mixture(parts, drawn, epoch_limits(self.data)),
            lambda samples: self._encoded(samples, phase.row_length),
            self.window,
            seed=self.data.seed,
            prefetch=1,
            on_bad=self.data.on_bad,
            max_bad=self.data.max_bad,
        )
        self._windows.bad, self._windows.bad_elsewhere = bad
        self._read_in, self._drawn = number, drawn
        self._before = self._windows.state_dict()
        self._rows: list[list[Document]] = []
        self._given = [0]

    def _begin(self, number: int) -> None:
        """Begins to give out rows of a phase, first those of the documents that are left."""
        left = [document for row in self._rows[self._given[-1] :] for document in row]
        self._rows = _full_rows(left, self.phases[number].row_length)
        self._given.append(0)

    def _encoded(self, samples: Sequence[tuple[int, Sample]], length: int) -> list[list[Document]]:
        encoded = self.encode([sample for _, sample in samples])
        return _full_rows([Document(tokens, [True] * len(tokens)) for tokens in encoded], length)

    def _following_rows(self) -> Iterator[list[Document]]:
        while True:
            while self._given[-1] == len(self._rows):
                if len(self._given) > 1:
                    self._open(self._read_in + len(self._given) - 1, self._drawn_so_far())
                if not self._read_window():
                    return
            self._given[-1] += 1
            yield self._rows[self._given[-1] - 1]

    def _read_window(self) -> bool:
        """Takes the next window, if there is one."""
        before = self._windows.state_dict()
        rows = next(self._windows, None)
        if rows is not None:
            self._before, self._rows, self._given = before, rows, [0]
        return rows is not None

    def _drawn_so_far(self) -> dict[str, int]:
        # A source may be left out of a phase and come back.
        return {**self._drawn, **self._windows.mixture.drawn(self._windows.consumed)}


def _full_rows(documents: Sequence[Document], length: int) -> list[list[Document]]:
    """Documents, cut where they are longer than a row, to as few rows as hold them."""
    pieces = [
        Document(document.tokens[start : start + length], document.targets[start : start + length])
        for document in documents
        for start in range(0, len(document.tokens), length)
    ]
    return [[pieces[i] for i in row] for row in pack([len(piece.tokens) for piece in pieces], length)]
