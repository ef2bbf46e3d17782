"""Samples that cannot be used: what is known of each, and how many of them a run puts up with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .shards import Sample

SHARE_FROM = 1_000
"""A share of bad samples is taken of so many at least, so that a bad one among the first is no half of all."""


class LoaderError(ValueError):
    """A bad sample, named by shard and key, or a state that does not fit the loader."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or collated.

    Args:
        position: its place in the global order.
        shard, key: of the sample; the name of the source and the sample's number there where it could not be read.
        member: the extension of the member that is to blame; "" where nobody knows.
        reason: the error's message, without shard and key.
    """

    position: int
    shard: str
    key: str
    member: str
    reason: str

    @classmethod
    def of(cls, position: int, sample: Sample, error: Exception) -> BadSample:
        """What an error says of a sample, each thing once."""
        member, where = _member(sample, error), f"{sample.shard}: sample {sample.key}"
        reason = str(error).removeprefix(f"{where}.{member}: ").removeprefix(f"{where}: ")
        return cls(position, sample.shard, sample.key, member, reason)

    def __str__(self) -> str:
        name = f"{self.key}.{self.member}" if self.member else self.key
        return f"{self.shard}: sample {name} (position {self.position}): {self.reason}"


def check_budget(max_bad: float | None, count: int, consumed: int, last: Sequence[object]) -> None:
    """
    Args:
        max_bad: at most so many bad samples, or, below 1, such a share of those consumed; None: any number.
        count: bad samples so far, `last` the most recent of them, or faults of shards.

    Raises:
        LoaderError: there are more; names the last ones.
    """
    if max_bad is None:
        return
    limit = max_bad if max_bad >= 1 else max_bad * max(consumed, SHARE_FROM)
    if count > limit:
        named = "".join(f"\n  {sample}" for sample in last[-5:])
        raise LoaderError(
            f"{count} bad samples of {consumed:,} are more than max_bad {max_bad:g} allows; the last:{named}"
        )


def _member(sample: Sample, error: BaseException | None) -> str:
    """Errors of reading a member name it, and those of decoding hold what could not be decoded."""
    while error is not None:
        if name := getattr(error, "member", ""):
            return name
        if (source := getattr(error, "source", None)) is not None:
            for name, content in sample.members.items():
                if content is source:
                    return name
        error = error.__cause__
    return ""
