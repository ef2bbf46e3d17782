"""A folder of bytes that can be had again: bounded, the least recently used go first, shared by processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Protocol
from uuid import uuid4

DEFAULT_LIMIT = 16 << 30
FREED = 0.1
"""Share of the limit that is freed at once, so that the folder need not be listed for each new entry."""
_ABANDONED = 3600
"""Seconds without a write, after which an unfinished entry is that of a process that was killed."""
_STEP = 16 << 20


class CacheFullError(OSError):
    """An entry does not fit into the cache."""


class Writable(Protocol):
    def write(self, content: bytes, /) -> object: ...


class ByteCache:
    """Entries by name, each a file that is there completely or not at all.

    Space is reserved under a lock that all processes share before anything is written, so that the files never take
    more than the limit together. What is in the folder is trusted: keep it where nobody else writes.

    Args:
        folder: default `$HERDKIT_CACHE`, else `herdkit` in `$XDG_CACHE_HOME` or in `~/.cache`; made when needed.
        limit: bytes of all entries together.
    """

    def __init__(self, folder: str | os.PathLike | None = None, limit: int = DEFAULT_LIMIT):
        if limit < 0:
            raise ValueError(f"limit must be at least 0 bytes, not {limit}")
        self.folder = Path(folder) if folder is not None else _default_folder()
        self.limit = limit

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes | None:
        """Bytes of an entry, all or fewer than `length` where it ends; None where there is none."""
        try:
            handle = os.open(self._path(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            with contextlib.suppress(OSError):  # a cache that is only read keeps no order of use
                os.utime(handle)
            return read_at(handle, offset, os.fstat(handle).st_size - offset if length is None else length)
        finally:
            os.close(handle)

    def path(self, name: str) -> Path | None:
        """The file of an entry, or None where there is none. It may be removed at any time, opened or not."""
        path = self._path(name)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError:
            pass
        return path

    def size(self, name: str) -> int | None:
        """Bytes of an entry, or None where there is none."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def put(self, name: str, content: bytes) -> None:
        """Keeps an entry.

        Raises:
            CacheFullError: it is larger than the limit.
            OSError: it cannot be written.
        """
        with self._entry(name, len(content)) as entry:
            entry.write(content)

    def make(self, name: str, write: Callable[[Writable], None]) -> None:
        """Has an entry written unless there is one. Of several processes that want it one does, the others wait.

        Raises:
            CacheFullError: it grows larger than the limit.
            OSError: it cannot be written; besides, what `write` raises.
        """
        with self._locked(f"making-{self._path(name).parent.name}"):
            if self.size(name) is None:
                with self._entry(name, 0) as entry:
                    write(entry)

    @contextlib.contextmanager
    def _entry(self, name: str, size: int) -> Iterator[_Entry]:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{uuid4().hex}.partial")
        entry = _Entry(self, temporary)
        try:
            entry.reserve(size)
            yield entry
            entry.close()
            with self._locked("total"):  # a listing meanwhile could meet the file under both names or under none
                temporary.replace(path)
        except BaseException:
            entry.position = 0
            entry.close()
            temporary.unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> Path:
        digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def account(self, handle: int, reserved: int, more: int) -> None:
        """Gives the file of an entry `more` bytes (or fewer, below 0) beyond those reserved, making room for them."""
        with self._locked("total") as total:
            counted = os.pread(total, 32, 0)
            used = int(counted) if counted else self._make_room(0)
            if self.limit - used < more and 0 < reserved + more <= self.limit:
                used = self._make_room(more)
            if more > 0 and used + more > self.limit:
                raise CacheFullError(
                    errno.ENOSPC, f"the cache of {self.limit} bytes in {self.folder} has no room for {more} bytes more"
                )
            os.ftruncate(handle, reserved + more)
            os.pwrite(total, b"%032d" % max(0, used + more), 0)

    def _make_room(self, more: int) -> int:
        """Removes the least recently used entries until `more` bytes fit; returns the bytes that are in use then."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in found)
        wanted = max(0, min(self.limit - more, int(self.limit * (1 - FREED))))
        for changed, size, path in sorted(found):
            unfinished = path.suffix == ".partial" and time.time() - changed / 1e9 < _ABANDONED
            if used > wanted and not unfinished:
                path.unlink(missing_ok=True)
                used -= size
        return used


class _Entry:
    """A file that is being written, never beyond what is reserved for it."""

    def __init__(self, cache: ByteCache, path: Path):
        self._cache, self._handle = cache, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._reserved = self.position = 0

    def reserve(self, size: int) -> None:
        if size > self._reserved:
            self._cache.account(self._handle, self._reserved, size - self._reserved)
            self._reserved = size

    def write(self, content: bytes) -> None:
        end = self.position + len(content)
        if end > self._reserved:
            step = min(_STEP, self._cache.limit // 32)
            try:
                self.reserve(end + step)
            except CacheFullError:
                self.reserve(end)
        while self.position < end:
            self.position += os.pwrite(self._handle, content[len(content) - (end - self.position) :], self.position)

    def close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            try:
                if self._reserved != self.position:
                    self._cache.account(handle, self._reserved, self.position - self._reserved)
            finally:
                os.close(handle)


def read_at(handle: int, offset: int, length: int) -> bytes:
    """Bytes of an open file; fewer than `length` only at its end."""
    content = os.pread(handle, length, offset)
    # The system reads no more than 2 GiB at once.
    while len(content) < length and (more := os.pread(handle, length - len(content), offset + len(content))):
        content += more
    return content


def _default_folder() -> Path:
    if own := os.environ.get("HERDKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "herdkit"
