"""`herdkit synthetic ...`: made pictures with their text, for annealing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .command_line import add_command


def add_synthetic_command(commands: Any) -> None:
    """Adds `synthetic` to the sub-parsers of a parser."""
    parser = add_command(
        commands,
        "synthetic",
        synthetic,
        "Make pictures and what they show, as shards of dialogs: charts with questions, tables, equations and others.",
        [
            "herdkit synthetic charts tables --count 5000 --out data/annealing",
            "herdkit synthetic charts --held-out --count 500 --out data/annealing",
        ],
        details="Kinds: charts (asked for their table, and questions on them; the second shards are questions),\n"
        "written_charts (the tables with questions, no pictures), tables, equations, flowcharts, paragraphs,\n"
        "grounding (boxes and marks), screenshots (drawn by an installed Chromium). Each goes into a folder of its\n"
        "own. The same seed makes the same samples.",
        interrupted="the same command goes on after the sets that are finished",
    )
    add = parser.add_argument
    add("kinds", nargs="+", metavar="KIND", help="what to make")
    add("--out", type=Path, required=True, metavar="DIR", help="takes a folder of shards for each set")
    add("--count", type=int, default=1000, metavar="N", help="pictures of each kind (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--held-out", action="store_true", help="test sets, of titles, values or scenes that no training set has")
    add("--side", type=int, default=336, metavar="PIXELS", help="of charts, tables and the like (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes that draw (%(default)s)")


def synthetic(options: argparse.Namespace) -> None:
    """`herdkit synthetic`."""
    from .synthetic.sets import build_annealing

    kinds: list[str] = options.kinds
    count: int = options.count
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, Any] = {}

        def progress(sets: str, done: int, total: int) -> None:
            task = tasks.setdefault(sets, None)
            if task is None:
                task = tasks[sets] = shown.add_task(sets, total=total)
            shown.update(task, completed=done)

        made = build_annealing(
            options.out,
            dict.fromkeys(kinds, count),
            options.seed,
            options.workers,
            progress,
            held_out=options.held_out,
            side=options.side,
        )
    for name, manifest in made.items():
        known = "" if "seconds" in manifest else ", made before"
        print(f"{options.out / name}: {manifest['samples']:,} samples{known}")
    print(json.dumps({"out": str(options.out), "sets": made}))
