"""Makes shards of files and tables: looks at everything first, then reads, checks and writes one sample after another.

Nothing is written before every sample has a good key of its own and every file is there. Samples are never held
together: what is kept of each is eight bytes of its key, and, to shuffle them, its place.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch

from .drafts import Draft, Input, InputError, Problem, draft_problem, file_problem, reason_of
from .media_check import sample_problems
from .shards import Sample, ShardError, ShardWriter

KEPT_PROBLEMS = 100

Progress = Callable[[str, int, int | None], None]
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(kw_only=True)
class Written:
    """What `write_shards` did.

    Args:
        shards: in order.
        samples, bytes: written, without what tar adds.
        skipped: problems that were passed over.
        problems: the first hundred of them.
    """

    shards: list[Path]
    samples: int
    bytes: int
    skipped: int
    problems: list[Problem]


def write_shards(
    pattern: str | os.PathLike,
    samples: Input,
    *,
    max_count: int = 10_000,
    max_bytes: int = 1 << 30,
    existing: Literal["error", "replace"] = "error",
    shuffle: int | None = None,
    check: bool = False,
    on_bad: Literal["raise", "skip"] = "raise",
    report: str | os.PathLike | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Written:
    """Makes shards of a `FolderTree`, a `Manifest`, or another input (see `herdkit.data.drafts`).

    The same input and arguments give the same bytes, whenever and by whomever. Killed at any moment, it leaves complete
    shards alone under their names; it does not go on from there.

    Args:
        pattern, max_count, max_bytes, existing: see `ShardWriter`.
        samples: gone through twice or more, so it must be the same each time.
        shuffle: seed of a random order of all samples; by default they keep the order of the input. A temporary file
            in the folder of the shards takes what tables say of the samples, without the contents of other files.
        check: decode every image, sound, video, text, JSON and dialog, see `herdkit.data.media_check`.
        on_bad: "raise" stops: before anything is written, with all problems that can be found so, or at the first
            member that cannot be read or decoded. "skip" leaves out the samples with problems and reports them.
        report: file for those left out, a line of JSON each: where, key, reason.
        workers: threads that read and check; so many samples, and twice as many more, are in memory.
        progress: called with ("looking" or "writing", samples done, their number where it is known).

    Raises:
        InputError: see `on_bad`; no sample is left at all.
        ShardError: shards exist, or the input has changed on the way.
        ValueError: see `ShardWriter`; or the input's own, see there.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad must be 'raise' or 'skip', not {on_bad!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if shuffle is not None and shuffle < 0:
        raise ValueError(f"shuffle must be a seed of at least 0, not {shuffle}")
    with ExitStack() as stack:
        writer = ShardWriter(pattern, max_count=max_count, max_bytes=max_bytes, existing=existing)
        problems = stack.enter_context(_Problems(None if report is None else Path(report)))
        bad, total, seen = _look(samples, problems, progress)
        good = total - len(bad)
        if problems.count and (on_bad == "raise" or not good):
            raise InputError(problems.first, problems.count)
        if not total:
            raise ShardError(f"{writer.pattern}: the input holds no samples")
        chosen: Iterable[Draft | Problem] = _all_but(samples, bad, seen)
        if shuffle is not None:
            spool = stack.enter_context(tempfile.TemporaryFile(dir=Path(writer.pattern).parent))
            chosen = _shuffled(chosen, spool, shuffle)
        stack.enter_context(writer)
        size = 0
        # Closed first of all, so that no thread outlives an error.
        found = stack.enter_context(closing(_in_order(lambda draft: _read(draft, check), chosen, workers)))
        for done, item in enumerate(found, start=1):
            if isinstance(item, Problem):
                problems.add(item)
                if on_bad == "raise":
                    raise InputError(problems.first, problems.count)
            else:
                writer.write(item.key, item.members)
                size += sum(map(len, item.members.values()))
            if progress is not None:
                progress("writing", done, good)
        if not writer.count:
            raise InputError(problems.first, problems.count)
    return Written(
        shards=writer.shards, samples=writer.count, bytes=size, skipped=problems.count, problems=problems.first
    )


class _Problems:
    """Counts problems, keeps the first, and writes all of them to a file, which is whole or absent."""

    def __init__(self, report: Path | None):
        self.first: list[Problem] = []
        self.count = 0
        self._report = report

    def __enter__(self) -> _Problems:
        self._file = None
        if self._report is not None:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            self._draft = self._report.with_name(f".{self._report.name}.{os.getpid()}.partial")
            self._file = self._draft.open("w", encoding="utf-8")
        return self

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < KEPT_PROBLEMS:
            self.first.append(problem)
        if self._file is not None:
            self._file.write(json.dumps(asdict(problem)) + "\n")

    def __exit__(self, *rest: object) -> None:
        # Also where the writing failed: the report says why.
        if self._file is not None and self._report is not None:
            self._file.close()
            self._draft.replace(self._report)


def _look(samples: Input, problems: _Problems, progress: Progress | None) -> tuple[set[int], int, bytes]:
    """The positions of what cannot be written, how many positions there are, and a digest of all that was seen."""
    bad: set[int] = set()
    digests = array("Q")
    seen = blake2b()
    total = 0
    for position, item in enumerate(samples):
        seen.update(_described(item))
        problem = item if isinstance(item, Problem) else draft_problem(item)
        if problem is not None:
            problems.add(problem)
            bad.add(position)
        elif isinstance(item, Draft):
            digests.append(_digest(item.key))
        total = position + 1
        if progress is not None:
            progress("looking", total, None)
    values, counts = np.unique(np.array(digests, np.uint64), return_counts=True)
    if repeated := set(values[counts > 1].tolist()):
        first: dict[str, str] = {}
        for position, item in enumerate(samples):
            if position in bad or isinstance(item, Problem) or _digest(item.key) not in repeated:
                continue
            if item.key in first:
                problems.add(Problem(item.where, item.key, f"its key is that of {first[item.key]} already"))
                bad.add(position)
            else:
                first[item.key] = item.where
    return bad, total, seen.digest()


def _digest(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")


def _described(item: Draft | Problem) -> bytes:
    """All of a sample but the contents of its members."""
    names = list(item.members) if isinstance(item, Draft) else item.reason
    return json.dumps([item.where, item.key, names]).encode()


def _all_but(samples: Input, bad: set[int], seen: bytes) -> Iterator[Draft | Problem]:
    again = blake2b()
    for position, item in enumerate(samples):
        again.update(_described(item))
        if position not in bad:
            yield item
    if again.digest() != seen:
        raise ShardError("the input has changed since it was looked at: begin anew")


def _read(draft: Draft | Problem, check: bool) -> Sample | Problem:
    """The sample with its files' contents; its shard is the place that it comes from."""
    if isinstance(draft, Problem):
        return draft
    content: dict[str, bytes] = {}
    for extension, source in draft.members.items():
        if isinstance(source, bytes):
            content[extension] = source
            continue
        if reason := file_problem(source):
            return Problem(draft.where, draft.key, reason)
        try:
            content[extension] = source.read_bytes()
        except OSError as error:
            return Problem(draft.where, draft.key, f"{source}: {reason_of(error)}")
    sample = Sample(draft.key, draft.where, content)
    if check and (reasons := sample_problems(sample)):
        return Problem(draft.where, draft.key, "; ".join(reasons))
    return sample


def _shuffled(drafts: Iterable[Draft | Problem], spool: BinaryIO, seed: int) -> Iterator[Draft | Problem]:
    """The drafts in random order, by way of a file: a line of JSON for each, then the contents that it holds."""
    starts = array("Q")
    for draft in drafts:
        starts.append(spool.tell())
        if isinstance(draft, Problem):
            spool.write(json.dumps({"problem": asdict(draft)}).encode() + b"\n")
            continue
        contents = [content for content in draft.members.values() if isinstance(content, bytes)]
        members = {
            extension: len(content) if isinstance(content, bytes) else os.fspath(content)
            for extension, content in draft.members.items()
        }
        spool.write(json.dumps({"where": draft.where, "key": draft.key, "members": members}).encode() + b"\n")
        for content in contents:
            spool.write(content)
    # numpy promises that the raw bits of a generator stay the same in later versions, not its permutations.
    bits = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(len(starts))
    for position in np.argsort(bits, kind="stable"):
        spool.seek(starts[position])
        line: dict[str, Any] = json.loads(spool.readline())
        if "problem" in line:
            yield Problem(**line["problem"])
            continue
        members = {name: spool.read(it) if isinstance(it, int) else Path(it) for name, it in line["members"].items()}
        yield Draft(line["where"], line["key"], members)


def _in_order(function: Callable[[Given], Made], items: Iterable[Given], workers: int) -> Generator[Made, None, None]:
    """The results in the order of the items, computed by some threads a little ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    torch.get_num_threads()  # a thread that has not asked yet would take over what another one sets
    pool = ThreadPoolExecutor(workers, "herdkit-writer", initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future[Made]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
