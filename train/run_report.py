"""`herdkit watch --html`: a page on one run or on several beside each other, in one file without scripts or links."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .files import write_text
from .run_view import RunView, duration, short_names
from .watch import grouped, metric_names, number, percent, size

POINTS = 1000  # of a line in a plot, at most
SMOOTHED = 100  # points, from which on a line is drawn with its moving average
FIRST = ("lr", "grad_norm", "tokens_per_second", "mfu", "gradient_sum_time", "effective_time", "peak_memory_bytes",
         "skipped_steps")  # fmt: skip
LAST = ("tokens", "samples", "wall_seconds")
WITHOUT_NOISE = {"lr", "effective_time", "peak_memory_bytes", "skipped_steps", *LAST}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.7rem; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dae2 }
h3 { margin: 1.5rem 0 .3rem; font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e4e8ee; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.n, td:first-child { white-space: nowrap }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .9rem; font-weight: 600; overflow-wrap: anywhere } img { width: 100% }
pre { background: #f5f7fa; padding: .8rem; overflow-x: auto; font-size: .8rem; line-height: 1.35 }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0 .3rem } .quiet { color: #667085 }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem }
"""

Points = list[tuple[int, float]]


def write_report(runs: Sequence[RunView], page: Path) -> None:
    """Writes the page. Runs are drawn over each other."""
    names = short_names(runs)
    title = ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
    now = datetime.fromtimestamp(runs[0].now, UTC)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=quiet>As of {now:%Y-%m-%d %H:%M:%S} UTC.</p>",
        overview(runs, names),
        "<h2>Metrics over steps</h2>",
        "<p class=quiet>Thin: as logged; thick: moving average. Dotted: where a run went on after an interruption.</p>",
        f"<div class=plots>{''.join(figures(runs))}</div>",
    ]
    for name, run in zip(names, runs, strict=True):
        parts += [f"<h2>{html.escape(name)}</h2>", *details(run)]
    body = "\n".join(parts)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>{body}</body></html>\n",
    )


def overview(runs: Sequence[RunView], names: Sequence[str]) -> str:
    """A row for each run, with the colour of its lines."""
    headings = ("run", "state", "step", "loss", "tokens/s", "effective time", "trained for", "skipped updates",
                "bad samples", "peak memory")  # fmt: skip
    rows = []
    for name, run, colour in zip(names, runs, colours(len(runs)), strict=True):
        last = run.last
        cells = (
            f"{run.step:,} of {run.steps:,}" if run.steps else f"{run.step:,}",
            number(last.get("loss")),
            grouped(last.get("tokens_per_second")),
            percent(last.get("effective_time")),
            duration(last["wall_seconds"]) if last else "-",
            grouped(last.get("skipped_steps", 0)),
            grouped(run.bad_samples),
            size(last.get("peak_memory_bytes")),
        )
        named = f'<span class=swatch style="background:{colour}"></span>{html.escape(name)}'
        rows.append([named, html.escape(run.account), *(html.escape(cell) for cell in cells)])
    return table(headings, rows, right_from=2)


def details(run: RunView) -> Iterable[str]:
    """What is known of one run beside its metrics."""
    yield f"<p class=quiet>{html.escape(str(run.path))}</p>"
    if run.evaluations:
        step, found = run.evaluations[-1]
        yield f"<h3>Evaluation after {step:,} steps</h3>"
        rows = [[html.escape(name), html.escape(_value(value))] for name, value in found.items()]
        yield table(("measure", "value"), rows, right_from=1)
    if run.events:
        yield "<h3>Starts</h3>" + starts_table(run)
    parts = next((event["parts"] for event in reversed(run.events) if "parts" in event), None)
    if parts:
        yield "<h3>What trains</h3>"
        rows = [[html.escape(row["part"]), f"{row['parameters']:,}", f"{row['trainable']:,}"] for row in parts]
        totals = [f"<b>{sum(row[key] for row in parts):,}</b>" for key in ("parameters", "trainable")]
        yield table(("part", "parameters", "trainable"), [*rows, ["<b>total</b>", *totals]], right_from=1)
    if run.recipe.get("freeze"):
        rules = [
            [html.escape(rule["pattern"]), "trained" if rule["trainable"] else "frozen", f"{rule['from_step']:,}"]
            for rule in run.recipe["freeze"]
        ]
        yield "<h3>Freeze rules, of which the last that matches counts</h3>"
        yield table(("parameters", "are", "from step"), rules, right_from=2)
    if run.profile is not None:
        text = html.escape(run.profile.read_text(encoding="utf-8"))
        yield f"<details><summary>Profile {run.profile.stem}</summary><pre>{text}</pre></details>"
    for heading, values in (("Recipe", run.recipe), ("Environment", run.environment), ("Result", run.result)):
        if values:
            text = html.escape(json.dumps(values, indent=1, ensure_ascii=False))
            yield f"<details><summary>{heading}</summary><pre>{text}</pre></details>"


def starts_table(run: RunView) -> str:
    headings = (
        "began (UTC)",
        "how it ended",
        "device",
        "processes",
        "from step",
        "to step",
        "made again",
        "idle before",
    )
    rows = [
        [
            f"{datetime.fromtimestamp(start.time, UTC):%Y-%m-%d %H:%M:%S}",
            html.escape(start.ending or run.account),
            html.escape(start.device),
            f"{start.processes:,}",
            f"{start.step:,}",
            f"{start.reached:,}",
            f"{start.lost:,}",
            "-" if start.idle is None else duration(start.idle),
        ]
        for start in run.starts()
    ]
    return table(headings, rows, right_from=3)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right_from: int) -> str:
    """Cells are HTML; numbers begin with column `right_from`."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if i < right_from else " class=n" for i in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{m}>{cell}</{tag}>' for m, cell in zip(marks, cells, strict=True))}</tr>"

    return f"<div class=wide><table>{line(headings, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def figures(runs: Sequence[RunView]) -> Iterable[str]:
    """A figure for every metric and every evaluated measure that any of the runs has."""
    names = list(dict.fromkeys(name for run in runs for name in metric_names(run.lines)))
    for name in ("loss", *names, *FIRST, *LAST):
        yield from figure(
            name, [[(line["step"], line[name]) for line in run.lines if name in line] for run in runs], runs
        )
    measures = list(dict.fromkeys(name for run in runs for _, found in run.evaluations for name in found))
    for name in measures:
        series = [[(step, found[name]) for step, found in run.evaluations if name in found] for run in runs]
        yield from figure(f"evaluation: {name}", series, runs)


def figure(name: str, series: Sequence[list[tuple[int, Any]]], runs: Sequence[RunView]) -> Iterable[str]:
    """One `<figure>`; none where no run has a number for it."""
    known = [[(step, value) for step, value in one if _is_number(value)] for one in series]
    if not any(known):
        return
    drawing = Figure((4.2, 2.5), layout="constrained")
    axes = drawing.subplots()
    for points, run, colour in zip(known, runs, colours(len(runs)), strict=True):
        _draw(axes, points, colour, smooth=len(points) >= SMOOTHED and name not in WITHOUT_NOISE)
        for start in run.starts()[1:]:
            axes.axvline(start.step, color=colour, linestyle=":", linewidth=0.8)
    values = [value for points in known for _, value in points]
    if name.endswith(("loss", "grad_norm")) and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    if not any(values):
        axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    # The name is no part of the drawing: matplotlib would read a $ in it as mathematics.
    label = html.escape(name)
    yield f'<figure><figcaption>{label}</figcaption><img alt="{label}" src="{_source(drawing)}"></figure>'


def colours(count: int) -> list[str]:
    palette = colormaps["tab10"] if count <= 10 else colormaps["turbo"].resampled(count)
    return ["#" + "".join(f"{round(255 * part):02x}" for part in palette(i)[:3]) for i in range(count)]


def thin(points: Points, most: int = POINTS) -> Points:
    """The lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    kept = []
    for stretch in np.array_split(np.arange(len(points)), most // 2):
        values = [points[i][1] for i in stretch]
        extremes = {int(stretch[int(np.argmin(values))]), int(stretch[int(np.argmax(values))])}
        kept += [points[i] for i in sorted(extremes)]
    return kept


def moving_average(points: Points) -> Points:
    """Over a fiftieth of the points around each, fewer at the ends."""
    values = np.array([value for _, value in points])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    half = max(len(values) // 100, 1)
    low, high = (np.clip(np.arange(len(values)) + shift, 0, len(values)) for shift in (-half, half + 1))
    means = (sums[high] - sums[low]) / (high - low)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def _draw(axes: Axes, points: Points, colour: str, smooth: bool) -> None:
    if not points:
        return
    width, alpha = (0.6, 0.4) if smooth else (1.3, 1.0)
    marked = "o-" if len(points) < 20 else "-"
    axes.plot(*zip(*thin(points), strict=True), marked, color=colour, markersize=3, linewidth=width, alpha=alpha)
    if smooth:
        axes.plot(*zip(*thin(moving_average(points)), strict=True), "-", color=colour, linewidth=1.4)


def _source(drawing: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasSVG(drawing).print_svg(buffer)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else json.dumps(value)
