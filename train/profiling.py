"""Traces of updates while a run trains, on request or at a step of the recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import parallel
from .files import sync, write_text
from .profile_request import REQUEST, ProfileError, ProfileRequest, take_request
from .profiles import remove_unfinished, table_path, trace_path
from .trace_summary import TraceSummary, as_text, summarise


@dataclass
class _Active:
    """A profile in the making; `trace` is None where this process has none, or `failure` says why."""

    request: ProfileRequest
    first: int
    trace: profile | None = None
    mark: record_function | None = None
    began: float = 0.0
    updates: int = 0
    failure: str | None = None

    def begin_update(self) -> None:
        # An update, with what follows it until the next, is a range of its own in the trace.
        self.mark = record_function(f"update {self.first + self.updates + 1}")
        self.mark.__enter__()

    def end_update(self) -> None:
        assert self.mark is not None
        self.mark.__exit__(None, None, None)
        self.updates += 1


class Profiling:
    """A context manager around the updates of one start.

    A file `profile` in the run directory (`herdkit profile`, or `touch`) asks for traces: the first process sees it,
    `wanted` goes into what all processes sum in each update, and with `agreed` all begin at the same one. They write
    `profiles/step-XXXXXXXX-rank-N.json.gz` (for Perfetto or chrome://tracing) and the first process, once all are
    through, `profiles/step-XXXXXXXX.txt`, where X counts the updates finished before. Training goes on bit for bit as
    without it, and also where a trace cannot be written.

    Args:
        at: traces the updates from this step on as well.
        say: prints a line.
    """

    def __init__(self, run_dir: Path, at: int | None, device: torch.device, say: Callable[[str], None]):
        self.run_dir, self.at, self.device, self.say = run_dir, at, device, say
        self.agreed = False
        self._active: _Active | None = None
        if parallel.rank() == 0:
            remove_unfinished(run_dir)

    def wanted(self) -> bool:
        """Whether there is a request; true on the first process alone."""
        return parallel.rank() == 0 and (self.run_dir / REQUEST).is_file()

    def turn(self, step: int) -> None:
        """Between two updates, `step` of them finished. All processes call it, and agree in `agreed`."""
        active = self._active
        if active is not None:
            active.end_update()
            if active.updates == active.request.updates:
                self._active = None
                self._finish(active)
            else:
                active.begin_update()
        if self._active is None and (self.agreed or step == self.at):
            self._begin(step)

    def __enter__(self) -> Profiling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active, self._active = self._active, None
        if active is None:
            return
        active.end_update()
        if kind is None:  # the run is shorter than the profile
            self._finish(active)
        elif active.trace is not None:  # the others may not be there to agree on anything
            active.trace.stop()

    def _begin(self, step: int) -> None:
        was_asked, self.agreed = self.agreed, False
        try:
            request = parallel.on_first(lambda: take_request(self.run_dir)) if was_asked else ProfileRequest()
            if not any(request.of(rank) for rank in range(parallel.world_size())):
                raise ProfileError(f"no profile: there is no process of ranks {request.ranks}")
        except ProfileError as error:
            self.say(str(error))
            return
        self._active = active = _Active(request, step)
        self._wait_for_device()
        if request.of(parallel.rank()):
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            try:
                active.trace = profile(activities=activities, acc_events=True)  # else it warns of cycles
                active.trace.start()
            except RuntimeError as error:  # another profiler is at work
                active.trace, active.failure = None, str(error)
        active.began = time.monotonic()
        active.begin_update()

    def _finish(self, active: _Active) -> None:
        found = parallel.gather(self._write_trace(active))
        if parallel.rank() > 0:
            return
        traced = [(rank, one) for rank, one in enumerate(found) if isinstance(one, TraceSummary)]
        failures = [f"process {rank}: no trace: {one}" for rank, one in enumerate(found) if isinstance(one, str)]
        title = f"updates {active.first + 1:,} to {active.first + active.updates:,}"
        text = "\n".join([as_text(title, *zip(*traced, strict=True)) if traced else title, *failures]) + "\n"
        path = table_path(self.run_dir, active.first)
        try:
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
        except OSError as error:
            failures.append(str(error))
        self.say("; ".join([f"profile: {path}", *failures]))

    def _write_trace(self, active: _Active) -> TraceSummary | str | None:
        """What this process found, why it has nothing, or None where it was not asked."""
        if active.trace is None:
            return active.failure
        self._wait_for_device()
        seconds = time.monotonic() - active.began
        path = trace_path(self.run_dir, active.first, parallel.rank())
        temporary = path.with_name(f".{path.name}")  # ends in .gz, by which the profiler knows to compress
        try:
            active.trace.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            active.trace.export_chrome_trace(str(temporary))
            sync(temporary)
            temporary.rename(path)
            return summarise(active.trace, seconds)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink()
            return str(error)

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
