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
from typing import Any

from ..data.loader import Loader
from ..data.mixture import Mixture
from ..data.packing import pack
from ..data.shards import Sample, ShardReader
from ..data.sources import DataConfig, source_names
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
        weights: of sources, by name; a source of weight 0 is left out.
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
    """Endless micro-batches of packed rows for a trainer with the batch sizes of the same phases.

    When a phase begins, what is left of the window at hand, fewer documents than one window, is passed over.

    Args:
        data: sources, seed, and what to do with bad samples; its row length and weights are those of the first phase.
        phases: from `plan_phases`.
        encode: samples to token ids, one list for each; runs in a worker thread. Its `ValueError` means a bad sample.
        pad_id: token of the padding.
        window: documents packed together. More of them leave less padding.
        rank, world_size: this process among those that share the order.

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
    ):
        if not data.sources:
            raise ValueError("data.sources is empty; name at least one set of shards")
        for phase in phases:
            phase.micro_batch_size(world_size)
        self.data, self.phases, self.encode, self.pad_id, self.window = data, phases, encode, pad_id, window
        self.rank, self.world_size = rank, world_size
        self.readers = dict(
            zip(source_names(data.sources), (ShardReader(source.shards) for source in data.sources), strict=True)
        )
        self.step, self.micro = 0, 0
        """Updates whose micro-batches have all been given out, and micro-batches of the next one that have."""
        self._phase = 0
        self._open({})

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        if self._phase + 1 < len(self.phases) and self.phases[self._phase + 1].from_step <= self.step:
            self._phase += 1
            self._open(self._windows.mixture.drawn(self._windows.consumed))
        phase = self.phases[self._phase]
        rows = phase.micro_batch_size(self.world_size)
        taken = [self._next_row() for _ in range(rows * self.world_size)]
        self.micro += 1
        if self.micro == phase.accumulate:
            self.step, self.micro = self.step + 1, 0
        return lay_out(taken[self.rank * rows : (self.rank + 1) * rows], self.pad_id, phase.row_length)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, the same on every rank."""
        return {
            "step": self.step,
            "micro": self.micro,
            "phase": self._phase,
            "drawn": self._drawn,
            "window": self._before,
            "given": self._given,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken, also with another number of processes.

        Raises:
            LoaderError: the seed or the sources differ.
        """
        self.step, self.micro, self._phase = state["step"], state["micro"], state["phase"]
        self._open(state["drawn"])
        self._windows.load_state_dict(state["window"])
        self._before = state["window"]
        if state["given"]:
            self._rows, self._given = next(self._windows), state["given"]

    def close(self) -> None:
        self._windows.close()

    def _open(self, drawn: dict[str, int]) -> None:
        """Begins a phase at the documents that follow those drawn."""
        if hasattr(self, "_windows"):
            self._windows.close()
        phase = self.phases[self._phase]
        parts = [(name, reader, phase.weights[name]) for name, reader in self.readers.items() if phase.weights[name]]
        # One position of the mixture after another, whatever the process: each packs all and takes its own rows.
        self._windows = Loader(
            Mixture(parts, drawn),
            lambda samples: self._pack([sample for _, sample in samples], phase.row_length),
            self.window,
            seed=self.data.seed,
            prefetch=1,
            on_bad=self.data.on_bad,
        )
        self._drawn = drawn
        self._before = self._windows.state_dict()
        self._rows: list[list[Document]] = []
        self._given = 0

    def _pack(self, samples: Sequence[Sample], length: int) -> list[list[Document]]:
        pieces = [
            Document(tokens[start : start + length], [True] * len(tokens[start : start + length]))
            for tokens in self.encode(samples)
            for start in range(0, len(tokens), length)
        ]
        return [[pieces[i] for i in row] for row in pack([len(piece.tokens) for piece in pieces], length)]

    def _next_row(self) -> list[Document]:
        while self._given == len(self._rows):
            self._before = self._windows.state_dict()
            self._rows, self._given = next(self._windows), 0
        self._given += 1
        return self._rows[self._given - 1]
