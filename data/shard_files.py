"""Where the bytes of shards come from: local files, URLs, and either of them compressed with gzip."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from braceexpand import braceexpand
from fsspec.core import url_to_fs
from webdataset.shardlists import expand_urls

from .byte_cache import ByteCache, Writable, read_at
from .faults import ShardError
from .remote_files import RemoteFile, patiently, with_defaults

SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Of the files that are shards where a folder is given."""
OPEN_FILES = 128
"""Local shards that are kept open at a time, in each process."""
_GUNZIP_STEP = 1 << 15
_STEP = 1 << 20


class ShardFile(Protocol):
    """Bytes to read at random. Reads give fewer than `length` only at the end, and raise `OSError` or `ShardError`."""

    name: str
    step: int
    """Bytes that take hardly longer to read than a few."""

    @property
    def size(self) -> int: ...

    @property
    def version(self) -> str: ...

    def read(self, offset: int, length: int, /) -> bytes: ...

    def fetch(self, offset: int, length: int, /) -> bytes:
        """`read` for what is read but once, and need not be cached."""
        ...

    def fetch_all(self, offsets: Sequence[int], length: int, /) -> list[bytes]: ...


class LocalFile:
    """A file of this machine, kept open between reads among the `OPEN_FILES` used last.

    Safe for threads, and for processes that fork: a read does not depend on the file's position.

    Raises:
        OSError: there is no such file.
    """

    step = 1 << 14

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)
        self._state = _state(os.stat(path))  # noqa: PTH116
        _, self.size, changed = self._state
        self.version = str(changed)

    def read(self, offset: int, length: int) -> bytes:
        # The object and not its number alone is kept while it is used: another thread may drop it from the cache.
        handle = _opened(self.name, self._state)
        if not handle.holds(self._state):
            handle = _Handle(self.name)
            if not handle.holds(self._state):
                raise ShardError(f"{self.name}: changed since it was indexed; open it anew")
        return read_at(handle.number, offset, length)

    fetch = read

    def fetch_all(self, offsets: Sequence[int], length: int) -> list[bytes]:
        return [self.read(offset, length) for offset in offsets]


State = tuple[int, int, int]
"""A file's inode, size in bytes and time of change in nanoseconds."""


def _state(status: os.stat_result) -> State:
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Handle:
    """An open file, closed with the last reference to it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def holds(self, state: State) -> bool:
        """Whether this is the file still: neither changed nor removed nor replaced."""
        status = os.fstat(self.number)
        return status.st_nlink > 0 and _state(status) == state

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, state: State) -> _Handle:
    # The state is there so that a file that took the place of another one under its name is not taken for it.
    return _Handle(path)


class GunzippedFile:
    """The content of a file compressed with gzip.

    It is decompressed as a whole, into the cache, when it is first read and when the cache has dropped it since: a
    gzip stream can only be read from its start. Of a damaged one the part before the damage is there.

    Raises:
        CacheFullError: from any read: the content is larger than the cache.
    """

    step = LocalFile.step

    def __init__(self, file: ShardFile, cache: ByteCache):
        self.name, self._file, self._cache = file.name, file, cache
        where = os.path.abspath(file.name) if isinstance(file, LocalFile) else file.name  # noqa: PTH100
        self._entry = f"gunzipped {where} {file.size} {file.version}"
        self._about: tuple[int, str] | None = None

    @property
    def version(self) -> str:
        return self._file.version

    @property
    def size(self) -> int:
        return self._describe()[0]

    @property
    def damage(self) -> str:
        """What is wrong with the compression, or ""."""
        return self._describe()[1]

    def read(self, offset: int, length: int) -> bytes:
        return self._get(offset, max(0, min(length, self.size - offset)))

    fetch = read

    def fetch_all(self, offsets: Sequence[int], length: int) -> list[bytes]:
        return [self.read(offset, length) for offset in offsets]

    def _get(self, offset: int, length: int) -> bytes:
        while (content := self._cache.get(self._entry, offset, length)) is None:
            self._cache.make(self._entry, self._gunzip)
        return content

    def _describe(self) -> tuple[int, str]:
        if self._about is None:
            while (total := self._cache.size(self._entry)) is None:
                self._cache.make(self._entry, self._gunzip)
            (length,) = struct.unpack("<Q", self._get(total - 8, 8))
            self._about = total - 8 - length, self._get(total - 8 - length, length).decode()
        return self._about

    def _gunzip(self, entry: Writable) -> None:
        damage, count = "", 0
        with gzip.GzipFile(fileobj=io.BufferedReader(_Sequential(self._file), _STEP)) as stream:
            try:
                while content := stream.read1(_GUNZIP_STEP):
                    entry.write(content)
                    count += len(content)
            except (zlib.error, gzip.BadGzipFile, EOFError) as error:
                damage = f"damaged gzip compression after byte {count} of the content: {error}"
        # What is wrong is kept behind the content, so that it is known as long as the content is.
        note = damage.encode()
        entry.write(note + struct.pack("<Q", len(note)))


class _Sequential(io.RawIOBase):
    def __init__(self, file: ShardFile):
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.fetch(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def open_file(path: str | os.PathLike, cache: ByteCache, options: Mapping[str, Any] | None = None) -> ShardFile:
    """A file as it is stored; a string with "://" is a URL."""
    if isinstance(path, str) and "://" in path:
        return RemoteFile(path, cache, options)
    return LocalFile(path)


def expand_shards(
    shards: str | os.PathLike | Iterable[str | os.PathLike], options: Mapping[str, Any] | None = None
) -> list[Path | str]:
    """The shards that paths, folders, URLs and patterns of them name, in order: paths, or URLs as strings.

    Raises:
        ShardError: one of them names no shard.
        OSError: a remote folder cannot be listed.
    """
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    if not given:
        raise ShardError("no shards given")
    return [path for item in given for path in _expand(os.fspath(item), options or {})]


def _expand(item: str, options: Mapping[str, Any]) -> list[Path | str]:
    if item.startswith("file://"):
        item = url_to_fs(item)[1]
    if "://" in item:
        found: list[Path | str] = [url for one in braceexpand(item) for url in _remote(one, options)]
    elif Path(item).is_dir():
        found = [Path(path) for path in _shards_among(map(str, Path(item).iterdir()), item)]
    elif Path(item).is_file():
        found = [Path(item)]
    else:
        found = []
        for path in expand_urls(item):
            found += map(Path, sorted(glob.glob(path))) if "*" in path else [Path(path)]  # noqa: PTH207
    if not found:
        raise ShardError(f"{item}: no shards there")
    return found


def _remote(url: str, options: Mapping[str, Any]) -> list[str]:
    def ask(fs: Any, path: str) -> list[str]:
        if "*" in url:
            return sorted(map(fs.unstrip_protocol, fs.glob(path)))
        if url.endswith("/") or (not url.startswith("http") and not url.endswith(SUFFIXES) and fs.isdir(path)):
            return _shards_among(map(fs.unstrip_protocol, fs.ls(path, detail=False)), url)
        return [url]

    return patiently(url, with_defaults(url, options), ask)


def _shards_among(paths: Iterable[str], folder: str) -> list[str]:
    found = sorted(path for path in paths if path.endswith(SUFFIXES))
    names = [re.sub(r"\.(tar|tar\.gz|tgz)$", "", path) for path in found]
    for name, count in Counter(names).items():
        if count > 1:
            raise ShardError(f"{folder}: holds {name} plain and compressed; name those that are to be read")
    return found
