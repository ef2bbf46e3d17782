"""What the loaders of a run left out, written to `bad_samples.jsonl`."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from . import parallel
from .files import drop_lines_after
from .objective import Loader


class BadSampleLog:
    """A line for each sample that the loader of any process left out: "step", the updates made when it was heard of,
    and what the loader knows of it (position, shard, key, member, reason). Before those stands a line for each fault of
    a shard, at step 0, with its offset. No file where there was none.

    Args:
        step: the updates made by the checkpoint that the run goes on from; lines past it are dropped.
    """

    def __init__(self, run_dir: Path, loader: Loader, step: int = 0):
        self.path, self.loader = run_dir / "bad_samples.jsonl", loader
        self._heard_of = len(getattr(loader, "bad", []))
        # After a resume the faults of the shards are there.
        faults = [] if step else [_line(0, fault) for fault in getattr(loader, "faults", [])]
        parallel.on_first(lambda: self._begin(step, faults))

    def collect(self, step: int) -> None:
        """Writes what is new, and tells each loader how many the others left out. All processes call it."""
        bad = getattr(self.loader, "bad", [])
        mine = [_line(step, sample) for sample in bad[self._heard_of :]]
        self._heard_of = len(bad)
        # Loaders that read the same samples on every process find the same bad ones.
        lines = list(dict.fromkeys(chain.from_iterable(parallel.gather(mine))))
        if elsewhere := len(lines) - len(mine):
            self.loader.bad_elsewhere += elsewhere  # type: ignore[attr-defined]
        if parallel.rank() == 0:
            self._append(lines)

    def _begin(self, step: int, lines: list[str]) -> None:
        drop_lines_after(self.path, step if step else -1)
        self._append(lines)

    def _append(self, lines: list[str]) -> None:
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)


def _line(step: int, what: Any) -> str:
    return json.dumps({"step": step, **asdict(what)})
