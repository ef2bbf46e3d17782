"""What the files of a run say of it, read while it is written, or after it was killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from .checkpoint import list_checkpoints, step_of
from .effective_time import STARTS
from .files import read_lines
from .profiles import tables
from .run_directory import RunDirectoryError

RECIPE, METRICS = "recipe.json", "metrics.jsonl"
DEPTH = 3  # folders below a folder of runs
RECENT = 20  # lines of the log that speed is taken from
LEAST_QUIET, QUIET_AT_FIRST = 60.0, 600.0  # seconds

State = Literal["running", "finished", "stopped", "silent"]


@dataclass(frozen=True)
class Start:
    """One start of a run and what became of it.

    Attributes:
        time: when, in seconds since 1970.
        step: the updates it began with; reached: the last it logged.
        lost: updates that the start before had logged and that this one made again.
        idle: seconds since the start before ended or wrote last; None for the first, or where it is not known.
        ending: why it ended; None where nothing says so.
    """

    time: float
    step: int
    reached: int
    lost: int
    idle: float | None
    device: str
    processes: int
    ending: str | None


@dataclass(frozen=True)
class RunView:
    """A run at one moment.

    Attributes:
        lines: of metrics.jsonl with what was measured while training, evaluations: (step, what was found).
        events: of starts.jsonl; none where an older release trained.
        checkpoint: (step, when it was written) of the newest.
        profile: the newest table of a profile.
        written: when any file of the run was last written, in seconds since 1970 like `now`.
    """

    path: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any] | None
    lines: list[dict[str, Any]]
    evaluations: list[tuple[int, dict[str, Any]]]
    events: list[dict[str, Any]]
    bad_samples: int
    checkpoint: tuple[int, float] | None
    profile: Path | None
    written: float
    now: float

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1] if self.lines else {}

    @property
    def step(self) -> int:
        return max(self.last.get("step", 0), self.checkpoint[0] if self.checkpoint else 0)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.recipe.get("trainer", {}).get("steps", 0)

    @property
    def quiet(self) -> float:
        """Seconds since anything was written."""
        return max(self.now - self.written, 0.0)

    @property
    def patience(self) -> float:
        """Seconds of silence that are nothing strange: five times the longest between two recent lines."""
        walls = [line["wall_seconds"] for line in self.lines[-RECENT:]]
        if len(walls) < 2:
            return QUIET_AT_FIRST
        return max(LEAST_QUIET, 5 * max(b - a for a, b in pairwise(walls)))

    @property
    def state(self) -> State:
        if (self.result or {}).get("steps") == self.steps == self.step:
            return "finished"
        if self.events and self.events[-1]["event"] == "end":
            return "stopped"
        return "silent" if self.quiet > self.patience else "running"

    @property
    def account(self) -> str:
        """The state in words."""
        if self.state == "stopped":
            return f"stopped {duration(self.quiet)} ago: {self.events[-1]['reason']}"
        if self.state == "silent":
            return f"silent for {duration(self.quiet)}: stalled or dead"
        return self.state

    @property
    def seconds_per_step(self) -> float | None:
        """Over the recent lines, pauses included."""
        recent = self.lines[-RECENT:]
        if not recent:
            return None
        first = recent[0] if len(recent) > 1 else {"step": 0, "wall_seconds": 0.0}
        steps = recent[-1]["step"] - first["step"]
        return (recent[-1]["wall_seconds"] - first["wall_seconds"]) / steps if steps else None

    @property
    def remaining(self) -> float | None:
        """Seconds to the last update, where the run goes on."""
        if self.state != "running" or self.seconds_per_step is None:
            return None
        return (self.steps - self.step) * self.seconds_per_step

    def starts(self) -> list[Start]:
        """From starts.jsonl."""
        begun = [event for event in self.events if event["event"] == "start"]
        endings: dict[int, dict[str, Any]] = {}
        number = -1
        for event in self.events:
            number += event["event"] == "start"
            if event["event"] == "end":
                endings[number] = event
        starts = []
        for i, event in enumerate(begun):
            following = begun[i + 1] if i + 1 < len(begun) else None
            ended_before = endings.get(i - 1, {}).get("time", event["written"]) if i else None
            starts.append(
                Start(
                    time=event["time"],
                    step=event["step"],
                    reached=max(following["reached"], event["step"]) if following else self.step,
                    lost=max(event["reached"] - event["step"], 0),
                    idle=None if ended_before is None else max(event["time"] - ended_before, 0.0),
                    device=event["device"],
                    processes=event["processes"],
                    ending=endings[i]["reason"] if i in endings else "killed" if following else None,
                )
            )
        return starts


def read_run(path: Path) -> RunView:
    """
    Raises:
        RunDirectoryError: it is not the directory of a run.
    """
    if not is_run(path):
        raise RunDirectoryError(_not_a_run(path))
    lines = [line for line in read_lines(path / METRICS) if isinstance(line.get("step"), int)]
    newest = list_checkpoints(path)[:1]
    times = [_written(path / name) for name in (RECIPE, METRICS, STARTS, "result.json", "bad_samples.jsonl")]
    times += [_written(newest[0])] if newest else []
    return RunView(
        path=path,
        recipe=_read(path / RECIPE) or {},
        environment=_read(path / "environment.json") or {},
        result=_read(path / "result.json"),
        lines=[line for line in lines if "wall_seconds" in line],
        evaluations=[(line["step"], line["evaluation"]) for line in lines if "evaluation" in line],
        events=[event for event in read_lines(path / STARTS) if "event" in event],
        # Faults of shards have no position.
        bad_samples=sum("position" in line for line in read_lines(path / "bad_samples.jsonl")),
        checkpoint=(step_of(newest[0]), _written(newest[0])) if newest else None,
        profile=next(reversed(tables(path)), None),
        written=max(times),
        now=time.time(),
    )


def is_run(path: Path) -> bool:
    return (path / RECIPE).is_file() or (path / METRICS).is_file()


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs that are meant by directories of runs and by folders of such.

    Raises:
        RunDirectoryError: there is no such directory, or no run in it.
    """
    found: list[Path] = []
    for path in paths:
        runs = [path] if is_run(path) else sorted(_runs_below(path))
        if not runs:
            raise RunDirectoryError(_not_a_run(path))
        found += [run for run in runs if run not in found]
    return found


def short_names(runs: Sequence[RunView]) -> list[str]:
    """Names that tell the runs apart."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath([run.path.resolve() for run in runs])
    return [str(run.path.resolve().relative_to(common)) for run in runs]


def duration(seconds: float) -> str:
    """In the two largest units: "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes} min {whole % 60} s"
    return f"{hours} h {minutes % 60} min" if days == 0 else f"{days} d {hours % 24} h"


def _runs_below(folder: Path, depth: int = DEPTH) -> list[Path]:
    if depth == 0 or not folder.is_dir():
        return []
    try:
        below = [Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except PermissionError:
        return []
    return [run for path in below for run in ([path] if is_run(path) else _runs_below(path, depth - 1))]


def _not_a_run(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such directory; give the --run-dir of `herdkit train`, or a folder of such"
    if not path.is_dir():
        return f"{path}: is a file; give the directory of a run, the --run-dir of `herdkit train`"
    return (
        f"{path}: no run in it: neither {RECIPE} nor {METRICS}, here or {DEPTH} folders deep; give the --run-dir of "
        "`herdkit train`, or a folder of such"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunDirectoryError(
            f"{path}: is not JSON ({error}); a whole run writes it anew at its next start"
        ) from None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # also a checkpoint that was deleted just now
        return 0.0
