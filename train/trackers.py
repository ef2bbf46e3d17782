"""TensorBoard and Weights & Biases: what metrics.jsonl holds, for those who look at it there."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from . import parallel
from .files import read_lines, write_json

PROJECT = "herdkit"

Line = dict[str, Any]


class TrackerError(RuntimeError):
    """A tracker cannot be used; one line that says what to do."""


class Trackers:
    """The trackers of one start; a context manager that closes them. The first process alone writes.

    Their packages are used as they are, not through `accelerate.tracking`: its trackers need accelerate's process
    state, and that sets torch's number of threads.

    Args:
        names: "tensorboard", "wandb". One that the run did not have before gets the whole log so far.
        step: what later starts logged is made again, and not shown twice.
        recipe: plain JSON values, shown by W&B.

    Raises:
        TrackerError: a package is missing, or W&B cannot start. Raised on all processes.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, step: int, recipe: dict[str, Any]):
        self._trackers: list[_Tracker] = []
        if names:
            parallel.on_first(lambda: self._open(names, run_dir, step, recipe))

    def _open(self, names: Sequence[str], run_dir: Path, step: int, recipe: dict[str, Any]) -> None:
        logged = [line for line in read_lines(run_dir / "metrics.jsonl") if "step" in line]
        for name in names:
            if name == "tensorboard":
                self._trackers.append(_TensorBoard(run_dir, step, logged))
            else:
                self._trackers.append(_WeightsAndBiases(run_dir, step, logged, recipe))

    def write(self, line: Line) -> None:
        """Copies a line of metrics.jsonl."""
        for tracker in self._trackers:
            tracker.write(line)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)


class _Tracker(Protocol):
    def write(self, line: Line) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, run_dir: Path, step: int, logged: Sequence[Line]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from None
        folder = run_dir / "tensorboard"
        is_new = not folder.exists()
        # TensorBoard leaves out what older files hold from `purge_step` on.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        if is_new:
            for line in _up_to(step, logged):
                self.write(line)

    def write(self, line: Line) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for all starts, whose id is in the run's wandb.json. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the
    other variables of its environment count."""

    def __init__(self, run_dir: Path, step: int, logged: Sequence[Line], recipe: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from None
        record = run_dir / "wandb.json"
        is_new = not record.exists()
        run_id = secrets.token_hex(4) if is_new else json.loads(record.read_text())["id"]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=run_dir,
                id=run_id,
                name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
                resume="allow",
            )
        except wandb.Error as error:
            raise TrackerError(
                f"trainer.trackers: W&B cannot start: {error} (WANDB_MODE=offline keeps everything on this machine)"
            ) from None
        write_json(record, {"id": run_id})
        self._run.config.update(recipe, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # W&B takes nothing back: what it was given before an interruption is not given again.
        self._given = set() if is_new else {_key(line) for line in logged}
        if is_new:
            for line in _up_to(step, logged):
                self.write(line)

    def write(self, line: Line) -> None:
        if _key(line) in self._given:
            return
        step = line["step"]
        # Its own count never goes back, not even for an evaluation that a later start makes of the same step.
        self._run.log({"step": step, **_numbers(line)}, step=max(step, self._run.step))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _missing(package: str, error: ImportError) -> TrackerError:
    return TrackerError(
        f"trainer.trackers: {package} cannot be imported ({error}); install it with pip install 'herdkit[trackers]'"
    )


def _key(line: Line) -> tuple[int, bool]:
    return line["step"], "evaluation" in line


def _up_to(step: int, logged: Sequence[Line]) -> list[Line]:
    return [line for line in logged if line["step"] <= step]


def _numbers(line: Line) -> dict[str, float]:
    """The finite numbers of a line beside its step, those of evaluations as "evaluation/name"."""
    named = {name: value for name, value in line.items() if name not in ("step", "evaluation")}
    named |= {f"evaluation/{name}": value for name, value in line.get("evaluation", {}).items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
