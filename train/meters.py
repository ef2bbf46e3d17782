"""What is measured while training: losses and metrics, speed, memory; written to `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import parallel
from .effective_time import EffectiveTime
from .files import drop_lines_after, finite, read_lines, sync
from .objective import Metrics
from .stopwatch import Stopwatch
from .trackers import Trackers

OWN_KEYS = {
    "step", "loss", "lr", "grad_norm", "tokens", "samples", "tokens_per_second", "wall_seconds",
    "peak_memory_bytes", "skipped_steps", "evaluation", "effective_time", "mfu",
    "gradient_sum_time", "slowest_rank", "slowest_over_median",
}  # fmt: skip


class Meters:
    """Sums of one run, and its log.

    `metrics.jsonl` has a line for every `log_every` updates: "step" counts finished updates; "loss" and the
    objective's metrics are means (sum / count) over all processes since the line before; "lr" and "grad_norm"
    (before clipping) are those of the last update; "tokens" (targets of the loss) and "samples" (places in
    micro-batches, also those that no sample filled) are totals of the updates made, "tokens_per_second" is since the
    line before, without the time of checkpoints and evaluations. "mfu" (model FLOPs utilisation) is the share that the
    model's own operations over the same time have of the devices' peak: forward pass and twice as much backward,
    nothing that is computed again; it is absent where one of the two is not known. "effective_time" is the useful share
    of the time since the run's first start, see `EffectiveTime`. "gradient_sum_time" is the share of the updates' own
    time, waiting for data included, that processes spent in sums over each other after the backward pass, waiting for
    the slowest included: the mean over processes since the line before; absent where there is one process. Sums that a
    layout makes within the backward pass are not in it. Several processes have "slowest_rank" and
    "slowest_over_median", see `Stragglers`. Lines with "evaluation" hold what the evaluation hook found. Numbers that
    are not finite are null.

    Args:
        state: `state_dict()` of the checkpoint that the run goes on from; lines past its step are dropped.
        peak: floating-point operations a second of all devices together at most, see `peak_flops`.
        device: that this process trains on.
        trackers: get every line too.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        state: dict[str, Any] | None,
        peak: float | None,
        device: torch.device,
        trackers: Trackers,
    ):
        state = state or {}
        self.path = run_dir / "metrics.jsonl"
        self.interval: dict[str, list[float]] = state.get("interval", {})
        self.run: dict[str, list[float]] = state.get("run", {})
        self.tokens: float = state.get("tokens", 0)
        self.samples: int = state.get("samples", 0)
        self.last: dict[str, Any] = state.get("last", {})
        self.earlier_seconds: float = state.get("wall_seconds", 0.0)
        self.started = time.monotonic()
        self.peak_memory: int = state.get("peak_memory_bytes", 0)
        self._local: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._interval_started = self.started
        self._interval_tokens = 0.0
        self._interval_flops = 0.0
        self._peak = peak
        self._trackers = trackers
        self.gradient_sum = Stopwatch(device)
        """To measure with what "gradient_sum_time" counts of each update."""
        self.effective = EffectiveTime(run_dir, state.get("useful_seconds", 0.0))
        parallel.on_first(lambda: drop_lines_after(self.path, step))

    def wall_seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.earlier_seconds + time.monotonic() - self.started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count for the speed."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._interval_started += time.monotonic() - before

    def update(
        self, loss: float, count: float, samples: int, metrics: list[Metrics], flops: float | None = None
    ) -> None:
        """Adds an update: its loss sum, count and FLOPs over all processes, and this process's metrics by batch."""
        seconds = self.effective.end_update()
        if parallel.world_size() > 1:
            self._add_local("gradient_sum_time", self.gradient_sum.seconds(), seconds)
        for sums in (self.interval, self.run):
            _add(sums, "loss", loss, count)
        self.tokens += count
        self._interval_tokens += count
        self._interval_flops += math.nan if flops is None else flops
        self.samples += samples
        for batch in metrics:
            for name, (value, number) in batch.items():
                if name in OWN_KEYS:
                    raise ValueError(f"metric '{name}' has the name of a field of metrics.jsonl: rename it")
                self._add_local(name, value, number)

    def log(self, step: int, lr: float, grad_norm: float, skipped: int, further: dict[str, Any] | None = None) -> None:
        """Writes the line of the updates since the last one, with further fields. All processes call it."""
        self._reduce()
        now = time.monotonic()
        seconds = max(now - self._interval_started, 1e-9)
        utilisation = self._interval_flops / seconds / (self._peak or math.nan)
        self._measure_memory()
        self.last = {
            "step": step,
            "loss": None,  # where no update of the interval was made
            **{name: _mean(pair) for name, pair in self.interval.items()},
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": round(self.tokens),
            "samples": self.samples,
            "tokens_per_second": self._interval_tokens / seconds,
            **({"mfu": utilisation} if math.isfinite(utilisation) else {}),
            "effective_time": self.effective.fraction(),
            "wall_seconds": self.wall_seconds(),
            "peak_memory_bytes": self.peak_memory,
            "skipped_steps": skipped,
            **(further or {}),
        }
        self._write(self.last)
        self.interval = {}
        self._interval_started, self._interval_tokens, self._interval_flops = now, 0.0, 0.0

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes what the evaluation hook found after `step` updates."""
        self._write({"step": step, "evaluation": values})

    def evaluation_of(self, step: int) -> dict[str, float] | None:
        """The evaluation that the log holds for a step."""

        def read() -> dict[str, float] | None:
            found = [
                line["evaluation"] for line in read_lines(self.path) if line["step"] == step and "evaluation" in line
            ]
            return found[-1] if found else None

        return parallel.on_first(read)

    def status(self) -> str:
        """The loss so far, for the progress line."""
        source = self.interval.get("loss")
        return f"loss {_mean(source) if source else self.last.get('loss') or math.nan:.4g}"

    def means(self) -> dict[str, float | None]:
        """Mean loss and metrics over the whole run. All processes call it."""
        self._reduce()
        return {name: _mean(pair) for name, pair in self.run.items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON values. All processes call it."""
        self._reduce()
        self._measure_memory()
        if parallel.rank() == 0 and self.path.exists():
            sync(self.path)
        return {
            "interval": self.interval,
            "run": self.run,
            "tokens": self.tokens,
            "samples": self.samples,
            "last": finite(self.last),
            "wall_seconds": self.wall_seconds(),
            "useful_seconds": self.effective.useful,
            "peak_memory_bytes": self.peak_memory,
        }

    def _add_local(self, name: str, value: Tensor | float, number: Tensor | float) -> None:
        # Detached sums stay on their device: reading them here would wait for it on every update.
        before = self._local.get(name, (0.0, 0.0))
        self._local[name] = (before[0] + _detached(value), before[1] + _detached(number))

    def _reduce(self) -> None:
        """Adds the metrics of all processes, which may have seen different names, to the sums."""
        local = {name: (float(value), float(number)) for name, (value, number) in self._local.items()}
        for pairs in parallel.gather(local):
            for name, pair in pairs.items():
                for sums in (self.interval, self.run):
                    _add(sums, name, *pair)
        self._local = {}

    def _measure_memory(self) -> None:
        """Peak memory: of the GPU where there is one, else resident of this process."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_memory = max(self.peak_memory, peak)

    def _write(self, line: dict[str, Any]) -> None:
        if parallel.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line)) + "\n")
            self._trackers.write(finite(line))


def _add(sums: dict[str, list[float]], name: str, value: float, count: float) -> None:
    pair = sums.setdefault(name, [0.0, 0.0])
    pair[0] += value
    pair[1] += count


def _mean(pair: list[float]) -> float:
    return pair[0] / pair[1] if pair[1] else math.nan


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach().double() if isinstance(value, Tensor) else value
