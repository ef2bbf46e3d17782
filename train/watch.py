"""`herdkit watch`: runs in a terminal while they train, from nothing but their files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .meters import OWN_KEYS
from .run_view import RunView, State, duration, find_runs, read_run, short_names

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=*#"
COURSE = 40  # characters of a metric's course
COLOURS: dict[State, str] = {"running": "green", "finished": "bold green", "stopped": "yellow", "silent": "bold red"}
WIDTH = 110  # of what goes to a file or a pipe


def watch(paths: Sequence[Path], *, once: bool = False, every: float = 3.0, console: Console | None = None) -> None:
    """Shows runs until all are finished: in a terminal live, elsewhere as a line for each that has logged more.

    Args:
        paths: of runs or folders of runs, looked for again at every turn. One run is shown in full, several in a line
            each.
        once: shows them as they are and returns.
        every: seconds from turn to turn.

    Raises:
        RunDirectoryError: there is no run.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    if once:
        console.print(picture(read_runs(paths), console.options.ascii_only))
    elif console.is_terminal:
        _live(paths, every, console)
    else:
        _in_lines(paths, every, console)


def read_runs(paths: Sequence[Path]) -> list[RunView]:
    return [read_run(path) for path in find_runs(paths)]


def picture(runs: Sequence[RunView], ascii_only: bool = False) -> RenderableType:
    """What is shown of runs."""
    bars = ASCII_BARS if ascii_only else BARS
    return _one(runs[0], bars) if len(runs) == 1 else _several(runs, bars)


def course(values: Sequence[float | None], width: int = COURSE, bars: str = BARS) -> str:
    """A line of bars, from the lowest value to the highest; each is the mean of its share of the values."""
    known = [value for value in values if value is not None]
    width = min(width, len(known))
    means = []
    for i in range(width):
        share = known[i * len(known) // width : (i + 1) * len(known) // width]
        means.append(sum(share) / len(share))
    if not means:
        return ""
    low, extent = min(means), (max(means) - min(means)) or 1.0
    return "".join(bars[min(int((mean - low) / extent * len(bars)), len(bars) - 1)] for mean in means)


def metric_names(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What the objective measured."""
    return list(dict.fromkeys(name for line in lines for name in line if name not in OWN_KEYS))


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def grouped(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def size(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f} GiB"


def _live(paths: Sequence[Path], every: float, console: Console) -> None:
    ascii_only = console.options.ascii_only
    with Live(console=console, auto_refresh=False) as live:
        for runs in _looks(paths, every):
            live.update(picture(runs, ascii_only), refresh=True)


def _in_lines(paths: Sequence[Path], every: float, console: Console) -> None:
    shown: dict[Path, tuple[int, State]] = {}
    for runs in _looks(paths, every):
        for run in runs:
            if shown.get(run.path) != (run.step, run.state):
                shown[run.path] = (run.step, run.state)
                console.print(_line(run), soft_wrap=True)


def _looks(paths: Sequence[Path], every: float) -> Iterator[list[RunView]]:
    """The runs as they are every so many seconds, at last when all are finished."""
    while True:
        yield (runs := read_runs(paths))
        if all(run.state == "finished" for run in runs):
            return
        time.sleep(every)


def _line(run: RunView) -> Text:
    parts = [
        f"{run.path} {run.step}/{run.steps or '?'}",
        f"loss {number(run.last.get('loss'))}",
        *(f"{name} {number(run.last.get(name))}" for name in metric_names(run.lines)),
        f"{grouped(run.last.get('tokens_per_second'))} tokens/s",
        *([f"remaining {duration(run.remaining)}"] if run.remaining is not None else []),
        run.account,
    ]
    return Text("  ".join(parts))


def _several(runs: Sequence[RunView], bars: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in ("run", "step", "of", "loss", "", "tokens/s", "effective", "remaining", "state"):
        right = heading in ("step", "of", "loss", "tokens/s", "effective", "remaining")
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "state")
    for name, run in zip(short_names(runs), runs, strict=True):
        table.add_row(
            Text(name),
            f"{run.step:,}",
            f"{run.steps:,}" if run.steps else "?",
            number(run.last.get("loss")),
            course([line.get("loss") for line in run.lines], 16, bars),
            grouped(run.last.get("tokens_per_second")),
            percent(run.last.get("effective_time")),
            "-" if run.remaining is None else duration(run.remaining),
            Text(run.account, style=COLOURS[run.state]),
        )
    return table


def _one(run: RunView, bars: str) -> Group:
    title = Text(str(run.path), style="bold").append(f"  {run.recipe.get('stage', '')}", style="not bold dim")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(overflow="fold")

    def row(name: str, value: str, more: str | Text = "") -> None:
        table.add_row(Text(name), value, more)

    last = run.last
    done = run.step / run.steps if run.steps else 0.0
    row("state", "", Text(run.account, style=COLOURS[run.state]))
    row("step", f"{run.step:,}", f"of {run.steps:,}  {_bar(done, bars)} {done:.0%}" if run.steps else "")
    if run.remaining is not None:
        row("remaining", duration(run.remaining), f"{number(run.seconds_per_step, 3)} s per step")
    for name in ("loss", *metric_names(run.lines), "lr", "grad_norm"):
        values = [line.get(name) for line in run.lines]
        row(name, number(last.get(name)), course(values, bars=bars) if name != "lr" else "")
    rates = [line.get("tokens_per_second") for line in run.lines]
    row("tokens/s", grouped(last.get("tokens_per_second")), course(rates, bars=bars))
    if "mfu" in last:
        row("MFU", percent(last["mfu"]))
    if "gradient_sum_time" in last:
        shares = [line.get("gradient_sum_time") for line in run.lines]
        row("gradient sums", percent(last["gradient_sum_time"]), course(shares, bars=bars))
    row("tokens", grouped(last.get("tokens")), f"{grouped(last.get('samples'))} samples")
    row("peak memory", size(last.get("peak_memory_bytes")))
    row("effective time", percent(last.get("effective_time")), _starts_in_words(run))
    if run.checkpoint is not None:
        row("checkpoint", f"{run.checkpoint[0]:,}", f"written {duration(max(run.now - run.checkpoint[1], 0))} ago")
    else:
        row("checkpoint", "-", "none yet")
    row("skipped updates", grouped(last.get("skipped_steps", 0)))
    row("bad samples", grouped(run.bad_samples))
    if run.evaluations:
        step, found = run.evaluations[-1]
        row("evaluation", f"{step:,}", Text("  ".join(f"{name} {_any(value)}" for name, value in found.items())))
    if run.profile is not None:
        row("profile", "", Text(str(run.profile.relative_to(run.path))))
    return Group(title, table)


def _starts_in_words(run: RunView) -> str:
    starts = run.starts()
    if len(starts) < 2:
        return ""
    idle, lost = sum(start.idle or 0.0 for start in starts), sum(start.lost for start in starts)
    return f"{len(starts)} starts, {lost:,} updates made again, idle for {duration(idle)}"


def _bar(fraction: float, bars: str, width: int = 24) -> str:
    full, empty = (bars[-1], bars[0])
    return full * round(fraction * width) + empty * (width - round(fraction * width))


def _any(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) or value is None else str(value)
