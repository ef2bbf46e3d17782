"""Stalls (section 3.3.4 of the paper): a thread in each process that notices when updates stop coming, and writes down
where everybody is."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch._C import _distributed_c10d

from . import parallel

STALLED = 75
"""Exit code of a process that ended itself for a stall; sysexits.h has it for "try again"."""
LONG = 10  # times the limit, for what takes long once
TICKS = 20  # looks within the limit
LONGEST_TICK = 10.0  # seconds


class Watchdog:
    """A context manager around a run, that reports when no update ends within a limit.

    The limit counts from the start of an update; it is ten times as long for the first update of a start, for a
    checkpoint and for an evaluation. A process that waits longer writes into the run directory, in the folder
    `stalls/START/step-00000012`, `rank-3.txt` with the Python stacks of all its threads and the last collectives that
    torch's flight recorder has seen: NCCL's as `flight_recorder_rank_3`, a pickle for `torchfrtrace`, and gloo's, which
    knows when they were called and which are over but not when they started, as `collectives_rank_3.json`. The other
    processes see the folder, whatever they do at that time, and write theirs into it. A process is reported once for a
    step, on standard error.

    It cannot see a process that is stopped as a whole, or that holds Python's interpreter lock; the others, which wait
    for it, report then.

    Args:
        limit: seconds; None watches nothing.
        ends: whether the process then ends with the exit code `STALLED`, so that what started it can start all
            processes again. It waits a little for the others to write their stacks.
        description: of the run, for the message.
    """

    def __init__(self, run_dir: Path, limit: float | None, ends: bool = False, description: str = "train"):
        self.limit = limit
        self.ends = ends
        self.description = description
        # A run that is started again may come to the same step: what was written then is not a call to write now.
        self.folder = run_dir / "stalls" / parallel.on_first(lambda: time.strftime("%Y-%m-%dT%H-%M-%S"))
        self._first: int | None = None
        self._place = (0, "start", True)
        self._since = time.monotonic()
        self._reported: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        if self.limit is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def note(self, step: int, place: str, long: bool = False) -> None:
        """Says where this process is.

        Args:
            step: finished updates; another one than before starts the clock anew.
            place: in words.
            long: this is no part of an update, and may take longer.
        """
        if self._first is None:
            self._first = step
        place_of_run = (step, place, long or step == self._first)
        if (step, place_of_run[2]) != (self._place[0], self._place[2]):
            self._since = time.monotonic()
        self._place = place_of_run

    def _watch(self) -> None:
        assert self.limit is not None
        tick = min(self.limit / TICKS, LONGEST_TICK)
        while not self._over.wait(tick):
            step, place, long = self._place
            waited = time.monotonic() - self._since
            name = f"step-{step + 1:08d}"
            if waited > self.limit * (LONG if long else 1) and name not in self._reported:
                self._report(name, f"no update has ended for {waited:.0f} s (step {step + 1}, {place})", tick)
            elif calls := self._calls():
                self._report(min(calls), f"another process has stalled (step {step + 1}, {place})", tick)

    def _calls(self) -> set[str]:
        return set(os.listdir(self.folder)) - self._reported if self.folder.is_dir() else set()  # noqa: PTH208

    def _report(self, name: str, reason: str, tick: float) -> None:
        self._reported.add(name)
        rank = parallel.rank()
        path = self.folder / name / f"rank-{rank}.txt"
        line = f"{self.description}: rank {rank} of {parallel.world_size()}: {reason}; stacks in {path}"
        if self.ends:
            # A timer, because it may be the disk that stalls.
            end = threading.Timer(max(1.0, 4 * tick), os._exit, [STALLED])
            end.daemon = True
            end.start()
            line += f"; the process ends with code {STALLED}"
        print(line, file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        if not dist.is_initialized():
            return
        if "nccl" in dist.get_backend_config():
            record = _distributed_c10d._dump_nccl_trace()  # pyright: ignore[reportAttributeAccessIssue]
            (path.parent / f"flight_recorder_rank_{rank}").write_bytes(record)
        else:
            record = _distributed_c10d._dump_fr_trace_json()  # pyright: ignore[reportAttributeAccessIssue]
            (path.parent / f"collectives_rank_{rank}.json").write_bytes(record)
