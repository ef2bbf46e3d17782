"""What the loaders of a run left out, written to `bad_samples.jsonl`."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from . import parallel
from .files import drop_lines_after
from .objective import Loader


class BadSampleLog:
    """A line for each sample that the loader of any process left out: "step", the updates made when it was heard of,
    and what the loader knows of it (position, shard, key, member, reason). No file where there was none.

    Args:
        step: the updates made by the checkpoint that the run goes on from; lines past it are dropped.
    """

    def __init__(self, run_dir: Path, loader: Loader, step: int = 0):
        self.path, self.loader = run_dir / "bad_samples.jsonl", loader
        self._heard_of = len(getattr(loader, "bad", []))
        parallel.on_first(lambda: drop_lines_after(self.path, step))

    def collect(self, step: int) -> None:
        """Writes what is new, and tells each loader how many the others left out. All processes call it."""
        bad = getattr(self.loader, "bad", [])
        mine = [json.dumps({"step": step, **asdict(sample)}) for sample in bad[self._heard_of :]]
        self._heard_of = len(bad)
        # Loaders that read the same samples on every process find the same bad ones.
        lines = list(dict.fromkeys(chain.from_iterable(parallel.gather(mine))))
        if elsewhere := len(lines) - len(mine):
            self.loader.bad_elsewhere += elsewhere  # type: ignore[attr-defined]
        if lines and parallel.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
