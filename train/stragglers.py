"""Stragglers (section 3.3.4 of the paper): which process is slower at its own work than the others, who wait for it."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import parallel

IN_A_ROW = 3  # lines of the log before it is said


class Stragglers:
    """Times each process from asking for the first micro-batch of an update to the end of its backward passes, before
    gradients are summed: what it does alone. Where the layout makes forward and backward passes wait for other
    processes, their waiting is in it.

    Args:
        factor: a process that takes so many times the median is slow.
        say: gets a line on a process that is slow in three lines of the log in a row, once.
    """

    def __init__(self, factor: float, say: Callable[[str], None], device: torch.device | None = None):
        self.factor = factor
        self.say = say
        self._cuda = device is not None and device.type == "cuda"
        self._warm = False
        self._seconds = 0.0
        self._began = 0.0
        self._slow: tuple[int, int] | None = None  # rank, lines in a row

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self) -> None:
        """After the backward passes. The first update of a start, with the loader's start, does not count."""
        if self._cuda and parallel.world_size() > 1:
            torch.cuda.synchronize()
        if self._warm:
            self._seconds += time.monotonic() - self._began
        self._warm = True

    def report(self) -> dict[str, Any]:
        """For the log, over the updates since the report before: "slowest_rank", and how many times the median its
        time is ("slowest_over_median"; of an even number of processes, the lower of the two in the middle). Empty on
        one process. All processes call it."""
        if parallel.world_size() == 1:
            return {}
        found = parallel.gather((self._seconds, socket.gethostname()))
        self._seconds = 0.0
        seconds = [value for value, _ in found]
        median = statistics.median_low(seconds)
        if not median:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[slowest] / median
        self._remember(slowest, ratio, found[slowest][1])
        return {"slowest_rank": slowest, "slowest_over_median": ratio}

    def _remember(self, rank: int, ratio: float, host: str) -> None:
        if ratio < self.factor:
            self._slow = None
            return
        lines = self._slow[1] + 1 if self._slow is not None and self._slow[0] == rank else 1
        self._slow = (rank, lines)
        if lines == IN_A_ROW:
            self.say(f"rank {rank} on {host} is slow: {ratio:.1f} times the median for {lines} lines of the log")
