"""The index of a shard: where each member of each sample lies in the tar, and what is wrong with it.

Its file is a safetensors file, so that it opens by mapping it, whatever its size, and others can read it too.
Arrays, with n samples, m members and the smallest unsigned dtype that will do:

    starts (n + 1)      sample i has the members starts[i] .. starts[i + 1]
    key_starts (n + 1)  and the key keys[key_starts[i] : key_starts[i + 1]], UTF-8
    offsets (m)         of the data, in units of `unit` bytes, from the start of the uncompressed tar
    sizes (m)           of the data in bytes
    headers (m)         CRC-32 of the first 157 of the 512 bytes before the data, the header: its name, size, time and
                        the sum of all its bytes, by which a read knows that the shard is the same still
    extensions (m)      number of the extension in the metadata's list
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from .faults import Fault, ShardError

__all__ = ["INDEX_SUFFIX", "MEMBER", "META", "Fault", "ShardError", "ShardIndex", "Stamp", "leaves_folder"]

INDEX_SUFFIX = ".index.safetensors"
_FORMAT, _VERSION = "herdkit.shard_index", 1
_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
_WORTH_MAPPING = 1 << 16
"""Bytes; a process can map some ten thousand files at most."""
_FAULT = ("offset", "reason", "key", "member", "skipped")
_ARRAYS = ("starts", "key_starts", "keys", "offsets", "sizes", "headers", "extensions")

MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
"""A member's name: the sample's key, up to the first dot of the file name, and the extension after it."""

META = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset reserves."""


@dataclass(frozen=True)
class Stamp:
    """Which file an index is of.

    Args:
        size: bytes, as stored.
        version: time of change in nanoseconds, or the ETag or the like of a remote file.
        fingerprint: of the size and of some pieces of the content; the same for a copy, unlike the version.
    """

    size: int
    version: str
    fingerprint: str


@dataclass(eq=False)
class ShardIndex:
    """The samples of a shard and where they lie; arrays as above."""

    stamp: Stamp
    compression: str
    """How the shard is compressed: "" or "gzip"."""
    extension_names: list[str]
    unit: int
    starts: np.ndarray
    key_starts: np.ndarray
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    headers: np.ndarray
    extensions: np.ndarray
    ignored: dict[str, int] = field(default_factory=dict)
    """How many entries of the tar belong to no sample, by kind."""
    unsafe: list[str] = field(default_factory=list)
    """Up to 100 keys that would leave their folder if they were taken for paths."""
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Single elements come faster out of memory views than out of arrays.
        self._views = {name: memoryview(getattr(self, name)) for name in _ARRAYS}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, sample: int) -> str:
        places = self._views["key_starts"]
        return str(self._views["keys"][places[sample] : places[sample + 1]], "utf-8", "surrogateescape")

    def find(self, key: str) -> int | None:
        """The first sample with this key, or None where there is none."""
        wanted = np.frombuffer(key.encode("utf-8", "surrogateescape"), np.uint8)
        places = self.key_starts.astype(np.int64)
        samples = np.flatnonzero(np.diff(places) == len(wanted))
        equal = (self.keys[places[samples, None] + np.arange(len(wanted))] == wanted).all(1)
        return int(samples[equal.argmax()]) if equal.any() else None

    def size(self, sample: int) -> int:
        """Bytes of the sample's members."""
        views = self._views
        return sum(views["sizes"][views["starts"][sample] : views["starts"][sample + 1]])

    def members(self, sample: int) -> tuple[list[str], list[int], list[int], list[int]]:
        """Of the sample's members: extensions, offsets and sizes of the data in bytes, CRC-32 of headers' starts."""
        views, names, unit = self._views, self.extension_names, self.unit
        some = slice(views["starts"][sample], views["starts"][sample + 1])
        return (
            [names[number] for number in views["extensions"][some]],
            [place * unit for place in views["offsets"][some]],
            views["sizes"][some].tolist(),
            views["headers"][some].tolist(),
        )

    def kinds(self) -> dict[str, int]:
        """How many samples have which extensions ("jpg, json"); nothing if there are too many for such a table."""
        names = sorted(self.extension_names)
        if len(names) > 63 or len(self) == 0:
            return {}
        bits = np.array([1 << names.index(name) for name in self.extension_names], np.int64)[self.extensions]
        found, counts = np.unique(np.add.reduceat(bits, self.starts[:-1].astype(np.int64)), return_counts=True)
        return {
            ", ".join(name for i, name in enumerate(names) if kind >> i & 1): count
            for kind, count in zip(found.tolist(), counts.tolist(), strict=True)
        }

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def to_bytes(self) -> bytes:
        """The index as a file."""
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "stamp": asdict(self.stamp),
            "compression": self.compression,
            "extension_names": self.extension_names,
            "unit": self.unit,
            "ignored": self.ignored,
            "unsafe": self.unsafe,
        }
        faults = [[getattr(fault, name) for name in _FAULT] for fault in self.faults]
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        arrays["faults"] = np.frombuffer(json.dumps(faults).encode(), np.uint8)
        return save(arrays, {_FORMAT: json.dumps(about)})

    @classmethod
    def from_bytes(cls, content: bytes | mmap.mmap, shard: str) -> ShardIndex:
        """The index of a file's content, which it goes on using; `shard` is for the faults.

        Raises:
            ValueError: it is no index, one of another version, or damaged.
        """
        try:
            (length,) = struct.unpack_from("<Q", content)
            header = json.loads(content[8 : 8 + length])
            about = json.loads(header["__metadata__"][_FORMAT])
            if about["version"] != _VERSION:
                raise ValueError(f"is an index of version {about['version']}, not {_VERSION}")
            arrays: dict[str, Any] = {name: _array(content, 8 + length, header[name]) for name in (*_ARRAYS, "faults")}
            starts, members = arrays["starts"], len(arrays["offsets"])
            lengths = {name: len(array) for name, array in arrays.items()}
            expected = {"key_starts": len(starts), "sizes": members, "headers": members, "extensions": members}
            if {**lengths, **expected} != lengths or len(starts) == 0:
                raise ValueError("has arrays that do not fit together")
            if (starts[-1], arrays["key_starts"][-1]) != (members, len(arrays["keys"])):
                raise ValueError("has arrays that do not fit together")
            faults = [Fault(shard, *fault) for fault in json.loads(arrays.pop("faults").tobytes())]
            names = ("compression", "extension_names", "unit", "ignored", "unsafe")
            settings: dict[str, Any] = {name: about[name] for name in names}
            return cls(stamp=Stamp(**about["stamp"]), faults=faults, **settings, **arrays)
        except (struct.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"is no index of a shard, or a damaged one ({type(error).__name__})") from error

    @classmethod
    def open(cls, path: str | os.PathLike, shard: str) -> ShardIndex:
        """Maps a file unless it is small: its pages are read when they are needed, and shared by all processes.

        Raises:
            OSError: there is no such file.
            ValueError: see `from_bytes`.
        """
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size < _WORTH_MAPPING:
                return cls.from_bytes(file.read(), shard)
            return cls.from_bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), shard)


def narrowed(values: Any) -> np.ndarray:
    """Whole numbers, at least 0, in the smallest dtype that holds them."""
    values = np.asarray(values, np.uint64)
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def leaves_folder(name: str) -> bool:
    """Whether a name, taken for a path, would lie outside of the folder that it is joined to, on any system.

    Such names are keys like any others to a reader, which never takes them for paths; nothing should write to them.
    """
    parts = re.split(r"[/\\]", name)
    return ".." in parts or (parts[0] == "" and len(parts) > 1) or bool(re.match(r"[A-Za-z]:", name)) or "\0" in name


def _array(content: bytes | mmap.mmap, base: int, entry: dict) -> np.ndarray:
    first, last = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if not 0 <= first <= last <= len(content) - base or entry["shape"] != [(last - first) // dtype.itemsize]:
        raise ValueError("is cut or damaged")
    return np.frombuffer(content, dtype, (last - first) // dtype.itemsize, base + first)
