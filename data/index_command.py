"""`herdkit shards index`."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from .byte_cache import DEFAULT_LIMIT, ByteCache
from .command_line import add_command
from .faults import Fault, ShardError
from .index_files import load_index
from .shard_files import expand_shards, open_file
from .wording import printable

_MAX_KINDS = 10


def add_index_command(group: Any) -> None:
    """Adds `index` to the sub-parsers of `herdkit shards`."""
    parser = add_command(
        group,
        "index",
        index,
        "Index shards by their headers, and print every fault. The exit code is 1 if there are any.",
        ["herdkit shards index 'data/laion/{00000..00099}.tar' --workers 8"],
        interrupted="the indexes that are complete stay; the same command goes on",
    )
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="files, folders, URLs, or patterns of these with braces or *")
    add("--index-folder", type=Path, metavar="FOLDER", help="for the indexes (beside each shard)")
    add("--rebuild", action="store_true", help="also of shards whose index is up to date")
    add("--workers", type=int, default=1, metavar="N", help="shards that are read at a time (%(default)s)")
    add_cache_options(parser)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-folder", type=Path, help="of remote and compressed shards ($HERDKIT_CACHE)")
    parser.add_argument("--cache-bytes", type=int, default=DEFAULT_LIMIT, help="limit of all in it (%(default)s)")


@dataclass
class Report:
    """What indexing shards found."""

    samples: int = 0
    members: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Samples by the extensions of their members."""
    ignored: Counter[str] = field(default_factory=Counter)
    unsafe: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def index(options: argparse.Namespace) -> None:
    """`herdkit shards index`."""
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}")
    cache = ByteCache(options.cache_folder, options.cache_bytes)
    paths = expand_shards(options.shards)
    jobs = [(path, cache, options.index_folder, options.rebuild) for path in paths]
    started = time.monotonic()
    total = Report()
    damaged = set()
    for path, report in zip(paths, _with_progress(_run(jobs, options.workers), len(jobs)), strict=True):
        for fault in report.faults:
            print(printable(str(fault)))
            damaged.add(path)
        if report.unsafe:
            example = printable(report.unsafe[0])
            print(f"{path}: has keys that would leave their folder if they were written as paths, such as {example}")
        for name in ("samples", "members", "bytes", "kinds", "ignored", "faults"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
    for kind, count in total.kinds.most_common(_MAX_KINDS):
        print(f"{count} samples of {printable(kind)}")
    for kind, count in total.ignored.items():
        print(f"{count} entries that belong to no sample: {kind}")
    result = {"shards": len(paths), "damaged_shards": len(damaged), "faults": len(total.faults)}
    result |= {name: getattr(total, name) for name in ("samples", "members", "bytes")}
    print(json.dumps({**result, "seconds": round(time.monotonic() - started, 3)}))
    if total.faults:
        raise ShardError(f"{len(total.faults)} faults in {len(damaged)} of {len(paths)} shards")


Job = tuple[Path | str, ByteCache, Path | None, bool]


def _index_one(job: Job) -> Report:
    path, cache, folder, rebuild = job
    try:
        found = load_index(open_file(path, cache), cache, folder, rebuild=rebuild, beside_remote=True)
    except OSError as error:
        return Report(faults=[Fault(str(path), 0, f"cannot open: {error.strerror or error}")])
    counts = {"samples": len(found), "members": len(found.offsets), "bytes": found.stamp.size}
    kinds, ignored = Counter(found.kinds()), Counter(found.ignored)
    return Report(**counts, kinds=kinds, ignored=ignored, unsafe=found.unsafe, faults=found.faults)


def _run(jobs: Sequence[Job], workers: int) -> Iterator[Report]:
    """In order. To read headers takes a core, so that local shards need processes; remote ones mostly wait."""
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from map(_index_one, jobs)
        return
    if any(isinstance(path, str) for path, *_ in jobs):
        executor = ThreadPoolExecutor(workers)
    else:
        executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with executor:
        yield from executor.map(_index_one, jobs)


def _with_progress(reports: Iterator[Report], count: int) -> Iterator[Report]:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(reports, total=count, description="shards")
