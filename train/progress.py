"""How far a long job is, on standard error: a bar in a terminal, a line about every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


class ProgressLine:
    """A context manager around one stage of work.

    Args:
        description: shown before the numbers.
        total: steps of the whole stage.
        done: steps that an earlier start finished.
        silent: shows nothing (processes other than the first).
    """

    def __init__(self, description: str, total: int, done: int = 0, silent: bool = False):
        self.description = description
        self.total = total
        self.first = done
        self.silent = silent
        self.console = Console(stderr=True, quiet=silent)
        self.bar: Progress | None = None

    def __enter__(self) -> ProgressLine:
        self.started = self.shown = time.monotonic()
        if sys.stderr.isatty() and not self.silent:
            bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[status]}"),
                console=self.console,
                refresh_per_second=2,
                speed_estimate_period=60,
            )
            self.task = bar.add_task(self.description, total=self.total, completed=self.first, rate="", status="")
            bar.start()
            self.bar = bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def due(self) -> bool:
        """Whether `update` would show something now; lets a caller save the work of finding the status."""
        return not self.silent and (self.bar is not None or time.monotonic() - self.shown >= PLAIN_SECONDS)

    def update(self, done: int, status: str) -> None:
        """Shows the number of finished steps, their rate, the time that remains and a short status."""
        if self.silent or not (done == self.total or self.due()):
            return
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, rate=f"{rate:.3g}/s", status=status)
            return
        self.shown = now
        remaining = timedelta(seconds=round((self.total - done) / rate)) if rate else "?"
        self._print_plain(f"{self.description} {done}/{self.total} {rate:.3g}/s remaining {remaining} {status}")

    def say(self, message: RenderableType) -> None:
        """Prints a line, or a table, that stays."""
        if isinstance(message, str):
            self._print_plain(message)
        else:
            self.console.print(message)

    def _print_plain(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
