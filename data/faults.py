"""What can be wrong with shards: errors, which stop, and faults, which are recorded and counted."""

from __future__ import annotations

from dataclasses import dataclass


class ShardError(ValueError):
    """A shard, or a sample of one, that cannot be read or written; the message names file and place."""


@dataclass(frozen=True)
class Fault:
    """Damage in a shard, or a sample that is left out because of damage.

    Args:
        shard: its path or URL.
        offset: in bytes, of the tar without compression.
        reason: what is wrong there.
        key: the sample that is left out, if it is known; one fault may stand for several that are not.
        member: the extension of its member, if it is one member that is wrong.
        skipped: bytes from `offset` on that could not be read, and may have held samples that nobody knows of.
    """

    shard: str
    offset: int
    reason: str
    key: str | None = None
    member: str | None = None
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"
