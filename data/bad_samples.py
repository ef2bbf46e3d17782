"""Samples that cannot be used, and the error that names them."""

from __future__ import annotations

from dataclasses import dataclass


class LoaderError(ValueError):
    """A bad sample, named by shard and key, or a state that does not fit the loader."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or collated, and why."""

    position: int
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key} (position {self.position}): {self.reason}"
