"""Samples that are about to be stored: what their members are to be made of, and what is wrong with them.

Inputs (`herdkit.data.folder_tree`, `herdkit.data.manifests`) are iterables of `Draft` and `Problem` that can be
gone through several times and give the same each time; `herdkit.data.shard_writing` makes shards of them.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .shards import MAX_MEMBER_BYTES, ShardError, naming_problem
from .wording import printable


@dataclass(frozen=True)
class Draft:
    """A sample whose files are not read yet.

    Args:
        where: the place in the input that it comes from, for reports.
        key: its name in the shard.
        members: by extension, in lower case: the file that holds it, or its content.
    """

    where: str
    key: str
    members: dict[str, Path | bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something of an input that cannot become a sample, or a part of a shard that is damaged.

    Args:
        where: file and line, row or folder.
        key: of the sample, as far as it is known.
        reason: what is wrong, in one line.
    """

    where: str
    key: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {f'sample {self.key}: ' if self.key else ''}{self.reason}")


Input = Iterable[Draft | Problem]


class InputError(ShardError):
    """Problems that stop the writing; the message names the first and their number.

    Attributes:
        problems: the first hundred or so. count: how many there are.
    """

    def __init__(self, problems: list[Problem], count: int):
        more = f"; {count - 1:,} more of {count:,} problems" if count > 1 else ""
        super().__init__(f"{problems[0]}{more}")
        self.problems, self.count = problems, count


def draft_problem(draft: Draft) -> Problem | None:
    """What can be said against a sample without reading its files."""
    if reason := naming_problem(draft.key, draft.members):
        return Problem(draft.where, "", reason)
    for content in draft.members.values():
        if isinstance(content, Path) and (reason := file_problem(content)):
            return Problem(draft.where, draft.key, reason)
    return None


def file_problem(path: Path) -> str | None:
    """Why a file cannot become a member, or None where it can."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{path}: {reason_of(error)}"
    except ValueError:
        return f"{path}: no file has a name with NUL in it"
    if stat.S_ISDIR(status.st_mode):
        return f"{path} is a folder, not a file"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file"
    if status.st_size == 0:
        return f"{path} is empty"
    if status.st_size > MAX_MEMBER_BYTES:
        return f"{path} has {status.st_size:,} bytes; a member has 8 GiB at most"
    return None


def reason_of(error: OSError) -> str:
    """An error of the operating system in the words of this module."""
    known = {errno.ENOENT: "no such file", errno.ELOOP: "a link that leads back to itself"}
    return known.get(error.errno or 0, error.strerror or str(error))
