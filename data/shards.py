"""Shards: plain webdataset tars, written in order, read at random through an index.

A sample is a run of members that share a key (the path up to the first dot of the file name), one for each
extension: `000017.json`, `000017.png`. Members without an extension, hidden ones and those in a `__folder__`
belong to no sample. As in webdataset; but a damaged shard is an error that says where, never fewer samples.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from webdataset.shardlists import expand_urls
from webdataset.writer import TarWriter

from .shard_index import INDEX_SUFFIX, MEMBER, META, ShardError, ShardIndex, load_index


class MemberError(ShardError):
    """A member of a sample, by its extension, that is missing or is not what it should be."""

    def __init__(self, message: str, member: str):
        super().__init__(message)
        self.member = member


@dataclass
class Sample:
    """One sample of a shard.

    Args:
        key: its name in the shard.
        shard: the path of the shard, for errors.
        members: contents by extension, in lower case, in the order of the shard.
    """

    key: str
    shard: str
    members: dict[str, bytes]

    def text(self, extension: str = "txt") -> str:
        """A member as UTF-8.

        Raises:
            MemberError: there is no such member, or it is not UTF-8.
        """
        if extension not in self.members:
            found = ", ".join(self.members)
            message = f"{self.shard}: sample {self.key}: no member '{extension}'; its members are {found}"
            raise MemberError(message, extension)
        try:
            return self.members[extension].decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{self.shard}: sample {self.key}.{extension}: not UTF-8: {error}"
            raise MemberError(message, extension) from error

    def json(self, extension: str = "json") -> Any:
        """A member as JSON.

        Raises:
            MemberError: there is no such member, or it is not JSON.
        """
        text = self.text(extension)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter where brackets are nested by the thousand
            message = f"{self.shard}: sample {self.key}.{extension}: not JSON: {error}"
            raise MemberError(message, extension) from error


class ShardWriter:
    """Writes samples to a numbered series of tars, a new one after `max_count` samples or `max_bytes` bytes.

    A shard has a temporary name until it is complete, and the same samples give the same bytes. If the `with`
    block fails, the shard under way is dropped and the complete ones stay.

        with ShardWriter("made/train-%06d.tar", max_count=1000) as writer:
            writer.write("000017", {"png": png, "json": {"messages": [...]}})

    Args:
        pattern: path with one integer format; its folder is made if need be.
        existing: what to do with shards of this pattern that are there already. They are never mixed with new
            ones: "error" refuses to start, "replace" removes them first.

    Raises:
        ShardError: shards exist, or a sample cannot be written.
    """

    def __init__(
        self,
        pattern: str | os.PathLike,
        *,
        max_count: int = 10_000,
        max_bytes: int = 1 << 30,
        existing: Literal["error", "replace"] = "error",
    ):
        self.pattern = os.fspath(pattern)
        if max_count < 1 or max_bytes < 1:
            raise ValueError(f"max_count and max_bytes must be at least 1, not {max_count} and {max_bytes}")
        if existing not in ("error", "replace"):
            raise ValueError(f"existing must be 'error' or 'replace', not {existing!r}")
        self._folder, name = Path(self.pattern).parent, Path(self.pattern).name
        if len(re.findall("%", name)) != 1 or not (number := re.search(r"%(0\d+)?d", name)):
            raise ValueError(f"{self.pattern}: the file name must hold one number, as in name-%06d.tar")
        self._form = (name[: number.start()], number.group(), name[number.end() :])
        self.max_count, self.max_bytes = max_count, max_bytes
        self.shards: list[Path] = []
        """The complete shards, in order."""
        self.count = 0
        """Samples written so far."""
        self._tar: TarWriter | None = None
        self._keys: set[str] = set()
        self._in_shard = self._bytes = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._matching(r"\.", r"\.\d+\.partial"):  # of a run that was killed
            left_over.unlink()
        found = self._matching()
        if found and existing == "error":
            raise ShardError(f"{found[0]} exists already, as one of {len(found)} shards; remove them first")
        for path in found:
            Path(f"{path}{INDEX_SUFFIX}").unlink(missing_ok=True)
            path.unlink()

    def write(self, key: str, members: Mapping[str, bytes | str | dict | list]) -> None:
        """Appends a sample: bytes as they are, text as UTF-8, dicts and lists as JSON."""
        self._check_key(key)
        if not members:
            raise ShardError(f"{self.pattern}: sample {key} has no members")
        for extension in members:
            if not re.fullmatch(r"[^A-Z/.\0][^A-Z/\0]*", extension) or extension.startswith("_"):
                raise ShardError(f"{self.pattern}: sample {key}: {extension!r} is no lower-case extension")
        content = {extension: _encoded(value, f"{key}.{extension}") for extension, value in members.items()}
        for extension in content:
            # Refused before anything of the sample is written; shorter names always fit.
            if len((name := f"{key}.{extension}").encode()) > 100:
                try:
                    tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)
                except ValueError as error:
                    raise ShardError(f"{self.pattern}: {name}: {error}") from error
        size = sum(map(len, content.values()))
        full = self._in_shard >= self.max_count or self._bytes + size > self.max_bytes
        if self._tar is not None and full:
            self._finish()
        tar = self._tar if self._tar is not None else self._begin()
        if key in self._keys:
            raise ShardError(f"{self.pattern}: key {key} is written twice")
        tar.write({"__key__": key, **content})
        self._keys.add(key)
        self._in_shard += 1
        self._bytes += size
        self.count += 1

    def close(self) -> None:
        """Completes the shard under way."""
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            try:
                self._tar.close()
            finally:
                self._tar = None
                self._file.close()
                self._temporary.unlink()

    def _begin(self) -> TarWriter:
        target = self._target()
        self._temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user="", group="", compress=False)
        self._keys.clear()
        self._in_shard = self._bytes = 0
        return self._tar

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        target = self._target()
        self._temporary.replace(target)
        self.shards.append(target)

    def _check_key(self, key: str) -> None:
        match = MEMBER.match(f"{key}.x")
        if match is None or match.group(1) != key or META.match(key) or "\0" in key:
            raise ShardError(f"{self.pattern}: a key has no dot in its last part and is no __name__: {key!r}")
        if key.startswith("/") or ".." in key.split("/"):
            raise ShardError(f"{self.pattern}: a key stays inside its folder, unlike {key!r}")

    def _target(self) -> Path:
        before, number, after = self._form
        return self._folder / (before + number % len(self.shards) + after)

    def _matching(self, prefix: str = "", suffix: str = "") -> list[Path]:
        before, _, after = self._form
        form = re.compile(prefix + re.escape(before) + r"\d+" + re.escape(after) + suffix)
        return sorted(path for path in self._folder.iterdir() if form.fullmatch(path.name))


class ShardReader:
    """The samples of some shards, in order, each read when asked for.

    Args:
        shards: a path, a folder (its `*.tar` in order), a pattern with braces (`name-{000000..000003}.tar`)
            or with `*` in the file name, or several of these.

    Raises:
        ShardError: a shard is missing, compressed, truncated or damaged. Reading a sample raises it when the
            shard has changed since.

    The index is kept in memory (some 100 bytes a sample) and in a file beside the shard, which is rebuilt
    when the shard's size or time of change differs. Safe to use from several threads and processes.
    """

    def __init__(self, shards: str | os.PathLike | Iterable[str | os.PathLike]):
        self.paths = _expand(shards)
        self._indexes = [load_index(path) for path in self.paths]
        self._ends = list(accumulate(len(index.keys) for index in self._indexes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Sample:
        length = len(self)
        if not -length <= position < length:
            raise IndexError(f"sample {position} of {length}")
        position %= length
        shard = bisect_right(self._ends, position)
        index, path = self._indexes[shard], self.paths[shard]
        number = position - (self._ends[shard - 1] if shard else 0)
        return Sample(index.keys[number], str(path), _read_members(path, index, number))

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def size(self, position: int) -> int:
        """The bytes of a sample's members, from the index alone."""
        shard = bisect_right(self._ends, position)
        index, number = self._indexes[shard], position - (self._ends[shard - 1] if shard else 0)
        return sum(index.sizes[index.starts[number] : index.starts[number + 1]])


def _encoded(value: object, where: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    raise TypeError(f"{where}: a member is bytes, text, a dict or a list, not {type(value).__name__}")


def _expand(shards: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    paths: list[Path] = []
    for item in (os.fspath(one) for one in given):
        if Path(item).is_dir():
            found = sorted(Path(item).glob("*.tar"))
        elif Path(item).is_file():
            found = [Path(item)]
        else:
            found = []
            for path in map(Path, expand_urls(item)):
                found += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        if not found:
            raise ShardError(f"{item}: no shards there")
        paths += found
    if not paths:
        raise ShardError("no shards given")
    return paths


def _read_members(path: Path, index: ShardIndex, number: int) -> dict[str, bytes]:
    first, last = index.starts[number], index.starts[number + 1]
    begin = index.offsets[first]
    length = index.offsets[last - 1] + index.sizes[last - 1] - begin
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(handle)
            if (status.st_size, status.st_mtime_ns) != (index.size, index.mtime_ns):
                raise ShardError(f"{path}: changed since it was indexed; open it anew")
            content = os.pread(handle, length, begin)
        finally:
            os.close(handle)
    except OSError as error:
        raise ShardError(f"{path}: cannot read sample {index.keys[number]}: {error.strerror}") from error
    if len(content) < length:
        raise ShardError(f"{path}: truncated at byte {begin + len(content)}, in sample {index.keys[number]}")
    members = {}
    for member in range(first, last):
        offset = index.offsets[member] - begin
        members[index.names[index.extensions[member]]] = content[offset : offset + index.sizes[member]]
    return members
