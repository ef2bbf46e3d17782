"""Effective training time (section 3.3.4 of the paper): useful time over elapsed time, over all starts of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import parallel
from .files import last_step, read_lines, sync

STARTS = "starts.jsonl"
FINISHED = "finished"


class EffectiveTime:
    """Counts what of a run's time was useful, and keeps `starts.jsonl`.

    Useful is the time of the updates that the weights hold, in seconds: from asking for the first micro-batch, so that
    waiting for data is in it, to the optimizer's step. It is kept in checkpoints, so that what was done after the last
    one is lost. Not useful are also updates left out, the first update of every start (the loader's start and
    compilation are in it), checkpoints, evaluations, and whatever else happens between updates.

    Elapsed is the wall-clock time since the first start, the idle time between a kill and the next start included. Not
    included is the time between the end of a finished run and a start that makes it longer, nor what a process does
    before it first calls `train`. A run whose first starts were not recorded counts from the first that was.

    `starts.jsonl` has, with "time" in seconds since 1970, a line for each "start" (the "step" it begins at; "reached",
    the last step in the log of the start before, and "written", when that was; device and layout) and for each "end",
    with its "reason". A start that was killed has no end.

    Args:
        useful: of the checkpoint that the run goes on from.
    """

    def __init__(self, run_dir: Path, useful: float = 0.0):
        self.path = run_dir / STARTS
        self.useful = useful
        self.origin = time.time()
        """When the run began, later by as long as it rested between a finish and the next start."""
        self._before = parallel.on_first(lambda: _end_of(run_dir / "metrics.jsonl"))
        self._began = time.monotonic()
        self._warm = False

    @contextmanager
    def start(self, step: int, **details: Any) -> Iterator[None]:
        """Around everything that one start does from `step` on."""
        # The other processes count too, but nobody reads what they find.
        if parallel.rank() == 0:
            self._write({"event": "start", "step": step, **self._before, **details})
            self.origin = _origin(read_lines(self.path))
        try:
            yield
        except BaseException as error:
            self._end(
                "told to terminate"
                if isinstance(error, SystemExit)
                else f"{type(error).__name__}: {error}".rstrip(": ")
            )
            raise
        self._end(FINISHED)

    def begin_update(self) -> None:
        self._began = time.monotonic()

    def end_update(self) -> float:
        """After an update that was made; returns its seconds."""
        seconds = time.monotonic() - self._began
        if self._warm:
            self.useful += seconds
        self._warm = True
        return seconds

    def elapsed(self) -> float:
        """Seconds. A clock that was set back does not make the run more than effective."""
        return max(time.time() - self.origin, self.useful, 1e-9)

    def fraction(self) -> float:
        """Useful over elapsed, in [0, 1]."""
        return self.useful / self.elapsed()

    def _end(self, reason: str) -> None:
        if parallel.rank() == 0:
            self._write({"event": "end", "reason": reason})

    def _write(self, line: dict[str, Any]) -> None:
        # A machine that died may have left half a line.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps({"time": time.time(), **line}) + "\n")
        sync(self.path)


def _end_of(log: Path) -> dict[str, Any]:
    return {"reached": last_step(log), "written": log.stat().st_mtime if log.exists() else None}


def _origin(lines: list[dict[str, Any]]) -> float:
    origin = lines[0]["time"]
    for before, line in pairwise(lines):
        if before.get("reason") == FINISHED:
            origin += line["time"] - before["time"]
    return origin
