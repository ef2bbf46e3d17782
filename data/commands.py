"""`herdkit shards ...`: the sub-commands that need no model."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .command_line import add_command
from .drafts import Input, InputError, Problem
from .folder_tree import FolderTree
from .index_command import add_index_command
from .manifests import SUFFIXES, Columns, Manifest
from .shard_writing import write_shards
from .wording import byte_size, counted, printable

SHOWN_PROBLEMS = 20


def add_shards_commands(commands: Any) -> Any:
    """Adds the group `shards` to the sub-parsers of a parser; returns its own, for further sub-commands."""
    parser = commands.add_parser("shards", help="Make, look at and index shards.", description="Work with shards.")
    group = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_write(group)
    add_index_command(group)
    return group


def _add_write(group: Any) -> None:
    parser = add_command(
        group,
        "write",
        write,
        "Make shards of a folder of files, or of CSV, JSON Lines or Parquet tables with a sample in each row.",
        [
            "herdkit shards write 'data/photos-%06d.tar' --from photos/",
            "herdkit shards write 'data/train-%06d.tar' --from captions.csv --key id --file image --text caption",
            "herdkit shards write 'data/chats-%06d.tar' --from chats.jsonl --dialog messages --shuffle 0 --check",
        ],
        details="In a folder, files whose paths agree up to the first dot of the name are one sample. In a table,\n"
        "--file, --text, --content and --dialog say what columns become; all others go into the member json.",
        interrupted="complete shards stay; to begin anew add --existing replace",
    )
    add = parser.add_argument
    add("pattern", metavar="OUT_PATTERN", help="path of the shards with one number, as in data/train-%%06d.tar")
    add("--from", dest="inputs", type=Path, nargs="+", required=True, metavar="PATH", help="a folder, or tables")
    add("--max-count", type=int, default=10_000, metavar="N", help="samples of a shard (%(default)s)")
    add("--max-bytes", type=_size, default=1 << 30, metavar="SIZE", help="of a shard, as in 300M or 1G (1G)")
    add("--existing", choices=("error", "replace"), default="error", help="what to do where shards are (%(default)s)")
    add("--shuffle", type=int, metavar="SEED", help="a random order of all samples; by default that of the input")
    add("--check", action="store_true", help="decode every image, sound, video, text, JSON and dialog")
    add("--on-bad", choices=("raise", "skip"), default="raise", help="stop at what cannot be used, or leave it out")
    add("--report", type=Path, metavar="FILE", help=".jsonl for all that was found bad")
    add("--workers", type=int, default=_cores(), metavar="N", help="threads that read and check (%(default)s)")
    add = parser.add_argument_group("tables").add_argument
    add("--key", metavar="COLUMN", help="of the samples' keys; by default they are numbered")
    column = {"action": "append", "default": [], "type": _column}
    add("--file", metavar="COLUMN[=EXT]", help="paths, relative to the table; may be repeated", **column)
    add("--text", metavar="COLUMN[=EXT]", help="text, for a member txt or EXT; may be repeated", **column)
    add("--content", metavar="COLUMN[=EXT]", help="Parquet: the bytes of a file; may be repeated", **column)
    add("--dialog", metavar="COLUMN", help="messages whose media are paths, relative to the table")
    add("--drop", metavar="COLUMN", action="append", default=[], help="to leave out; may be repeated")
    add("--missing", choices=("error", "omit"), default="error", help="what an empty --file, --text, --content means")
    add("--delimiter", metavar="CHARACTER", help="of CSV (a comma; in .tsv a tab)")


def write(options: argparse.Namespace) -> None:
    """`herdkit shards write`."""
    samples = _input(options)
    names = ("max_count", "max_bytes", "existing", "shuffle", "check", "on_bad", "report", "workers")
    settings = {name: getattr(options, name) for name in names}
    try:
        with _bar() as progress:
            written = write_shards(options.pattern, samples, progress=progress, **settings)
    except InputError as error:
        _print_problems(error.problems, error.count)
        raise
    if isinstance(samples, FolderTree) and samples.ignored:
        which = f"{samples.ignored:,}, such as {printable(samples.first_ignored)}"
        print(f"left out, since they are hidden or have no extension: {which}", file=sys.stderr)
    if written.skipped:
        _print_problems(written.problems, written.skipped)
    result = {"shards": len(written.shards), "samples": written.samples, "bytes": written.bytes}
    first, last = written.shards[0], written.shards[-1]
    made = f"{counted(written.samples, 'sample')} in {counted(len(written.shards), 'shard')}"
    print(f"{made}, {byte_size(written.bytes)}: {first}{f' to {last}' * (first != last)}")
    print(json.dumps({**result, "skipped": written.skipped, "pattern": options.pattern}))


def _input(options: argparse.Namespace) -> Input:
    """What --from names: one folder, or one table or more."""
    for path in options.inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    given = {"--key": options.key, "--file": options.file, "--text": options.text, "--content": options.content}
    given |= {"--dialog": options.dialog, "--drop": options.drop, "--delimiter": options.delimiter}
    if not any(path.is_dir() for path in options.inputs):
        columns = Columns(
            key=options.key,
            files=_mapping("--file", options.file),
            texts={column: extension or "txt" for column, extension in _mapping("--text", options.text).items()},
            contents=_mapping("--content", options.content),
            dialog=options.dialog,
            dropped=tuple(options.drop),
            missing=options.missing,
        )
        return Manifest(options.inputs, columns, delimiter=options.delimiter)
    if len(options.inputs) > 1:
        raise ValueError(f"--from takes one folder, or tables ({', '.join(SUFFIXES)}); put the folders into one")
    if used := [name for name, value in given.items() if value]:
        raise ValueError(f"{options.inputs[0]} is a folder, and {used[0]} is about tables")
    folder = options.inputs[0]
    if Path(options.pattern).absolute().parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{options.pattern} lies in {folder}, which it is made of; write to another folder")
    return FolderTree(folder)


def _mapping(option: str, pairs: list[tuple[str, str | None]]) -> dict[str, str | None]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError(f"{option} names a column twice")
    return mapping


def _column(text: str) -> tuple[str, str | None]:
    """A column and an extension."""
    column, equals, extension = text.rpartition("=")
    if not equals:
        return text, None
    if not column or not extension:
        raise argparse.ArgumentTypeError(f"COLUMN or COLUMN=EXT, not {text!r}")
    return column, extension


def _size(text: str) -> int:
    """A number of bytes; the letters are powers of 1024."""
    if not (match := re.fullmatch(r"([0-9.]+)([KMGT]?)", text.upper())):
        raise argparse.ArgumentTypeError(f"a number of bytes, as in 300M, not {text!r}")
    return int(float(match.group(1)) * 1024 ** " KMGT".index(match.group(2) or " "))


def _cores() -> int:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, 8)


def _print_problems(problems: list[Problem], count: int) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem, file=sys.stderr)
    if count > SHOWN_PROBLEMS:
        print(f"... and {count - SHOWN_PROBLEMS:,} more; --report FILE keeps all of them", file=sys.stderr)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on standard error, as a function of (what is done, so many, of so many)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(compact=True), console=Console(stderr=True))
    tasks: dict[str, Any] = {}
    latest: dict[str, tuple[int, int | None]] = {}
    shown = 0.0

    def update(what: str, done: int, total: int | None) -> None:
        nonlocal shown
        latest[what] = done, total
        if time.monotonic() - shown > 0.1:  # samples come faster than anybody can read
            show()
            shown = time.monotonic()

    def show() -> None:
        for what, (done, total) in latest.items():
            if what not in tasks:
                bar.start()
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

    try:
        yield update
    finally:
        show()
        if tasks:  # else there would be an empty line
            bar.stop()
