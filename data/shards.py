"""Shards: plain webdataset tars, written in order, read at random through an index.

A sample is a run of members that share a key (the path up to the first dot of the file name), one for each
extension: `000017.json`, `000017.png`. Members without an extension, hidden ones and those in a `__folder__`
belong to no sample. As in webdataset; but a damaged shard is an error that says where, never fewer samples.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar
from zlib import crc32

from webdataset.writer import TarWriter

from .byte_cache import ByteCache
from .index_files import load_index
from .shard_files import GunzippedFile, ShardFile, expand_shards, open_file
from .shard_index import INDEX_SUFFIX, MEMBER, META, Fault, ShardError, ShardIndex, leaves_folder
from .tar_headers import BLOCK, START

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OPENED_AT_ONCE = 16

MAX_MEMBER_BYTES = (1 << 33) - 1
"""The largest member: what the size field of a plain tar header holds."""


class MemberError(ShardError):
    """A member of a sample, by its extension, that is missing or is not what it should be."""

    def __init__(self, message: str, member: str):
        super().__init__(message)
        self.member = member


@dataclass
class Sample:
    """One sample of a shard.

    Args:
        key: its name in the shard; nothing but a name, whatever it looks like.
        shard: the path of the shard, for errors.
        members: contents by extension, in lower case, in the order of the shard.
    """

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def leaves_folder(self) -> bool:
        """Whether the key would lie outside of the folder that it is joined to, so that nothing may be written there:
        it is absolute, or has `..` in it."""
        return leaves_folder(self.key)

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
            ones: "error" refuses to start, "replace" removes them when the first new sample is written, or none was
            to be.

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
        self._old = self._matching()
        if self._old and existing == "error":
            count, first = len(self._old), self._old[0]
            raise ShardError(f"{first} exists already, as one of {count} shards; remove or replace them")

    def write(self, key: str, members: Mapping[str, bytes | str | dict | list]) -> None:
        """Appends a sample: bytes as they are, text as UTF-8, dicts and lists as JSON."""
        if problem := naming_problem(key, members):
            raise ShardError(f"{self.pattern}: {problem}")
        content = {extension: _encoded(value, f"{key}.{extension}") for extension, value in members.items()}
        for extension, value in content.items():
            if len(value) > MAX_MEMBER_BYTES:
                raise ShardError(f"{self.pattern}: {key}.{extension}: {len(value)} bytes; the limit is 8 GiB")
        size = sum(map(len, content.values()))
        if self._tar is not None and self._bytes + size > self.max_bytes:
            self._finish()
        tar = self._tar if self._tar is not None else self._begin()
        if key in self._keys:
            raise ShardError(f"{self.pattern}: key {key} is written twice")
        tar.write({"__key__": key, **content})
        self._keys.add(key)
        self._in_shard += 1
        self._bytes += size
        self.count += 1
        if self._in_shard >= self.max_count:
            self._finish()

    def close(self) -> None:
        """Completes the shard under way."""
        self._remove_old()
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
        self._remove_old()
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

    def _remove_old(self) -> None:
        while self._old:
            path = self._old.pop()  # from the end: what is left is the beginning of the old series
            Path(f"{path}{INDEX_SUFFIX}").unlink(missing_ok=True)
            path.unlink()

    def _target(self) -> Path:
        before, number, after = self._form
        return self._folder / (before + number % len(self.shards) + after)

    def _matching(self, prefix: str = "", suffix: str = "") -> list[Path]:
        before, _, after = self._form
        form = re.compile(prefix + re.escape(before) + r"\d+" + re.escape(after) + suffix)
        return sorted(path for path in self._folder.iterdir() if form.fullmatch(path.name))


class ShardReader:
    """The samples of some shards, in order, each read when asked for.

    Shards are local tars or URLs of any protocol of fsspec (extra "remote" for http and s3), plain or compressed with
    gzip. Their indexes are mapped into memory, so that those of many millions of samples open at once; a shard without
    one is indexed first, which reads its headers. Safe to use from several threads and forked processes. Names in a
    shard are keys, never paths.

    Args:
        shards: a path, a folder (its `*.tar`, `*.tar.gz` and `*.tgz` in order), a URL (one of a folder ends with "/"),
            a pattern of these with braces (`name-{000000..000003}.tar`) or with `*`, or several of them.
        index_folder: where the indexes are and where new ones go; default: beside each shard, or in the cache for
            remote ones.
        on_fault: "raise" refuses shards with any damage; "skip" reads what is good of them, and `faults` has the rest.
        cache: for what is read of remote and of compressed shards.
        storage_options: for fsspec, of all URLs.

    Raises:
        ShardError: a shard is missing, truncated or damaged (see `on_fault`). Reading a sample raises it when the
            shard has changed since.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Iterable[str | os.PathLike],
        *,
        index_folder: str | os.PathLike | None = None,
        on_fault: Literal["raise", "skip"] = "raise",
        cache: ByteCache | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ):
        if on_fault not in ("raise", "skip"):
            raise ValueError(f"on_fault must be 'raise' or 'skip', not {on_fault!r}")
        cache, options = cache or ByteCache(), storage_options or {}
        self._settings = {"index_folder": index_folder, "on_fault": on_fault, "cache": cache}
        self._settings["storage_options"] = storage_options
        self.paths: list[Path | str] = expand_shards(shards, options)
        """Of the shards: paths, and URLs as strings."""

        def open_shard(path: Path | str) -> tuple[ShardFile, ShardIndex]:
            try:
                file = open_file(path, cache, options)
                index = load_index(file, cache, index_folder)
            except OSError as error:
                raise ShardError(f"{path}: cannot open: {error.strerror or error}") from error
            if index.faults and on_fault == "raise":
                more = f"; {len(index.faults) - 1} more faults" if len(index.faults) > 1 else ""
                raise ShardError(f"{index.faults[0]}{more}")
            return GunzippedFile(file, cache) if index.compression else file, index

        opened = _in_order(open_shard, self.paths)
        self._files = [file for file, _ in opened]
        self._indexes = [index for _, index in opened]
        self.faults: list[Fault] = [fault for index in self._indexes for fault in index.faults]
        """What is damaged, with `on_fault="skip"`: every sample that is not given out has a fault or lies in one."""
        self._ends = list(accumulate(map(len, self._indexes)))
        packed = [file.name for file in self._files if isinstance(file, GunzippedFile)]
        if packed:
            logger.warning(
                "%d of %d shards are compressed with gzip (%s), which is slower: a sample can only be had by "
                "decompressing the whole shard, into %s (up to %d bytes). Unpack them if they are read more than once",
                len(packed), len(self.paths), packed[0], cache.folder, cache.limit,
            )  # fmt: skip

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Sample:
        shard, number = self._at(position)
        index, file = self._indexes[shard], self._files[shard]
        key = index.key(number)
        try:
            return Sample(key, file.name, _read_members(file, index, number, key))
        except OSError as error:
            raise ShardError(f"{file.name}: cannot read sample {key}: {error.strerror or error}") from error

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def name(self, position: int) -> tuple[str, str]:
        """The shard and the key of a sample, from the index alone."""
        shard, number = self._at(position)
        return str(self._files[shard].name), self._indexes[shard].key(number)

    def size(self, position: int) -> int:
        """The bytes of a sample's members, from the index alone."""
        shard, number = self._at(position)
        return self._indexes[shard].size(number)

    def find(self, key: str) -> int:
        """The position of the first sample with this key.

        Raises:
            LookupError: there is none.
        """
        for before, index in zip([0, *self._ends], self._indexes, strict=False):
            if (number := index.find(key)) is not None:
                return before + number
        raise LookupError(f"no sample has the key {key!r}")

    def _at(self, position: int) -> tuple[int, int]:
        """The shard of a position, and the sample's number there."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        position %= len(self)
        shard = bisect_right(self._ends, position)
        return shard, position - (self._ends[shard - 1] if shard else 0)

    def __reduce__(self) -> tuple:
        # Another process maps the indexes itself.
        return _reader, (self.paths, self._settings)


def _reader(paths: list[Path | str], settings: dict[str, Any]) -> ShardReader:
    return ShardReader(paths, **settings)


def naming_problem(key: str, extensions: Collection[str]) -> str | None:
    """Why no shard can hold a sample of this key with members of these extensions, or None where one can."""
    match = MEMBER.match(f"{key}.x")
    if "\0" in key:
        return f"a key holds no NUL, unlike {key!r}"
    if match is None or match.group(1) != key or META.match(key):
        return f"a key is not empty, has no dot in its last part and is no __name__, unlike {key!r}"
    if key.startswith("/") or ".." in key.split("/"):
        return f"a key stays inside its folder, unlike {key!r}"
    if not extensions:
        return f"sample {key} has no members"
    for extension in extensions:
        if not re.fullmatch(r"[^A-Z/.\0][^A-Z/\0]*", extension) or extension.startswith("_"):
            return f"sample {key}: {extension!r} is no lower-case extension"
        name = f"{key}.{extension}"
        try:
            if len(name.encode()) > 100:  # shorter names always fit
                tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)
        except UnicodeEncodeError:
            return f"{name!r} is not Unicode text, as names in a shard must be"
        except ValueError as error:
            return f"{name}: {error}"
    return None


def _encoded(value: object, where: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    raise TypeError(f"{where}: a member is bytes, text, a dict or a list, not {type(value).__name__}")


def _in_order(call: Callable[[Path | str], T], paths: list[Path | str]) -> list[T]:
    """Remote shards are opened many at a time, since that is but waiting."""
    if not any(isinstance(path, str) for path in paths):
        return [call(path) for path in paths]
    with ThreadPoolExecutor(_OPENED_AT_ONCE, "herdkit-shards") as executor:
        return list(executor.map(call, paths))


def _read_members(file: ShardFile, index: ShardIndex, number: int, key: str) -> dict[str, bytes]:
    extensions, offsets, sizes, headers = index.members(number)
    members: dict[str, bytes] = {}
    begin = end = 0
    content = b""
    for place, offset in enumerate(offsets):
        if offset > end or place == 0:  # members that lie close to one another are read together
            begin, end = offset - BLOCK, _end_of_stretch(offsets, sizes, place, file.step)
            content = file.read(begin, end - begin) if 0 <= begin < end <= file.size else b""
            if len(content) < end - begin:
                raise ShardError(f"{file.name}: ends in sample {key}, before byte {end}; index it anew")
        start = offset - begin
        if crc32(content[start - BLOCK : start - BLOCK + START]) != headers[place]:
            raise ShardError(f"{file.name}: changed since it was indexed, at byte {offset}; index it anew")
        members[extensions[place]] = content[start : start + sizes[place]]
    return members


def _end_of_stretch(offsets: list[int], sizes: list[int], first: int, near: int) -> int:
    end = offsets[first] + sizes[first]
    for offset, size in zip(offsets[first + 1 :], sizes[first + 1 :], strict=True):
        if offset - end > near:
            break
        end = offset + size
    return end
