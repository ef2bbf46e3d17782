"""What is in shards: how many samples of which members, how large, and what of it is damaged."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .byte_cache import ByteCache
from .drafts import Problem
from .index_files import load_index
from .media_check import sample_problems
from .shard_files import expand_shards, open_file
from .shards import Sample
from .wording import byte_size, counted, printable

BAR_WIDTH = 40


@dataclass(frozen=True)
class Spread:
    """Some numbers, summed up.

    Args:
        count, total, least, median, most: what they say.
        bins: (from, up to but not including, how many) of a histogram with round borders.
    """

    count: int
    total: int
    least: int
    median: int
    most: int
    bins: list[tuple[int, int, int]]

    @classmethod
    def of(cls, numbers: Sequence[int] | array) -> Spread:
        """Of at least one whole number from 0 on."""
        values = np.asarray(numbers, dtype=np.int64)
        least, most = int(values.min()), int(values.max())
        borders = _borders(least, most)
        counts, _ = np.histogram(values, borders)
        bins = list(zip(borders, borders[1:], counts.tolist(), strict=False))
        return cls(len(values), int(values.sum()), least, int(np.median(values)), most, bins)


def _borders(least: int, most: int) -> list[int]:
    """1, 2, 5, 10, 20 ... where the numbers lie far apart; else equal steps of such a size, at most a dozen."""
    rounds = [digit * 10**power for power in range(19) for digit in (1, 2, 5)]
    if most >= 32 * max(least, 1):
        above = next(i for i, border in enumerate(rounds) if border > most)
        below = max((i for i, border in enumerate(rounds) if border <= least), default=-1)
        return ([0] if below < 0 else []) + rounds[max(below, 0) : above + 1]
    step = next(step for step in rounds if (most - least) // step < 12)
    return list(range(least // step * step, most + step + 1, step))


@dataclass
class Survey:
    """What the headers of shards say.

    Args:
        shards: those that can be read, in order. samples: in all of them.
        members: sizes in bytes of the members with each extension.
        sizes: of whole samples in bytes; None where there are none.
        damaged: shards that cannot be read, and what is wrong with others.
    """

    shards: list[Path | str]
    samples: int
    members: dict[str, Spread]
    sizes: Spread | None
    damaged: list[Problem] = field(default_factory=list)


def survey_shards(shards: str | os.PathLike | Iterable[str | os.PathLike], cache: ByteCache | None = None) -> Survey:
    """Looks through the indexes of shards; no sample is read.

    Args:
        shards, cache: as for `ShardReader`.

    Raises:
        ShardError: nothing matches. A damaged or missing shard is no error, but listed in the result.
        OSError: a remote folder cannot be listed.
    """
    members: dict[str, array] = {}
    sizes = array("q")
    readable, damaged = [], []
    cache = cache or ByteCache()
    for path in expand_shards(shards):
        try:
            index = load_index(open_file(path, cache), cache)
        except OSError as error:
            damaged.append(Problem(str(path), "", f"cannot open: {error.strerror or error}"))
            continue
        damaged += [Problem(str(path), fault.key or "", fault.reason) for fault in index.faults]
        if index.faults and not len(index):
            continue
        readable.append(path)
        of_members, extensions = np.asarray(index.sizes, dtype=np.int64), np.asarray(index.extensions)
        for number, extension in enumerate(index.extension_names):
            members.setdefault(extension, array("q")).extend(of_members[extensions == number].tolist())
        if len(of_members):
            sizes.extend(np.add.reduceat(of_members, np.asarray(index.starts, dtype=np.int64)[:-1]).tolist())
    found = {extension: Spread.of(members[extension]) for extension in sorted(members)}
    return Survey(readable, len(sizes), found, Spread.of(sizes) if sizes else None, damaged)


def as_text(found: Survey) -> str:
    """A survey for people."""
    total = sum(spread.total for spread in found.members.values())
    lines = [f"{counted(len(found.shards), 'shard')}, {counted(found.samples, 'sample')}, {byte_size(total)}", ""]
    width = max([len(extension) for extension in found.members] + [6])
    lines.append(f"{'member':<{width}}" + "".join(f"{h:>11}" for h in ("count", "least", "median", "most", "total")))
    for extension, spread in found.members.items():
        sizes = (spread.least, spread.median, spread.most, spread.total)
        cells = "".join(f"{byte_size(size):>11}" for size in sizes)
        lines.append(f"{printable(extension):<{width}}{spread.count:>11,}{cells}")
    if found.sizes is not None:
        lines += ["", "sizes of samples", *histogram(found.sizes, byte_size)]
    return "\n".join(lines)


def histogram(spread: Spread, name: Callable[[int], str] = "{:,}".format) -> list[str]:
    """A line with a bar for each bin; `name` writes a border."""
    fullest = max(count for _, _, count in spread.bins)
    labels = [f"{name(low):>8} .. {name(high):>8}" for low, high, _ in spread.bins]
    return [
        f"  {label}  {_bar(count / fullest):<{BAR_WIDTH}} {count:,}"
        for label, (_, _, count) in zip(labels, spread.bins, strict=True)
    ]


def _bar(share: float) -> str:
    eighths = round(share * BAR_WIDTH * 8)
    partial = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return "█" * (eighths // 8) + (partial or ("▏" if share and not eighths else ""))


def damaged_samples(samples: Iterable[Sample], progress: Callable[[int], None] | None = None) -> Iterator[Problem]:
    """The members among these samples that are not what their extensions say, see `herdkit.data.media_check`.

    Args:
        progress: called with the number of samples done.
    """
    for done, sample in enumerate(samples, start=1):
        for reason in sample_problems(sample):
            yield Problem(sample.shard, sample.key, reason)
        if progress is not None:
            progress(done)
