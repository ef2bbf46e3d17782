"""The index of a shard: where each member of each sample lies in the tar, and the shard's health.

Built from the headers alone and kept beside the shard, so that a reader opens at once and any sample is one
read away. Building it also checks that the shard is whole: tar readers take a damaged header for the end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".idx.json"
_INDEX_VERSION = 1
_BLOCK = 512

MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
"""A member's name: the sample's key, up to the first dot of the file name, and the extension after it."""

META = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset reserves."""


class ShardError(ValueError):
    """A shard, or a sample of one, that cannot be read or written; the message names file and place."""


@dataclass
class ShardIndex:
    """Sample i has the members starts[i] .. starts[i + 1]."""

    size: int
    mtime_ns: int
    keys: list[str]
    starts: array
    names: list[str]
    """The distinct extensions, which `extensions` refers to."""
    extensions: array
    offsets: array
    sizes: array


def load_index(path: Path) -> ShardIndex:
    """The index beside the shard if it is of the shard as it is now, else one built and, if possible, kept.

    Raises:
        ShardError: the shard is missing, compressed, truncated or damaged.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path}: cannot open: {error.strerror}") from None
    sidecar = path.with_name(path.name + INDEX_SUFFIX)
    index = _read_sidecar(sidecar)
    if index is None or (index.size, index.mtime_ns) != (status.st_size, status.st_mtime_ns):
        index = _scan(path, status)
        _write_sidecar(sidecar, index)
    return index


def _scan(path: Path, status: os.stat_result) -> ShardIndex:
    size, changed = status.st_size, status.st_mtime_ns
    index = ShardIndex(size, changed, [], array("q"), [], array("H"), array("q"), array("q"))
    numbers: dict[str, int] = {}
    seen: set[str] = set()
    offset = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                offset = tar.offset
                match = MEMBER.match(member.name)
                if not member.isfile() or match is None or META.match(member.name):
                    continue
                if member.issparse():
                    raise ShardError(f"{path}: {member.name} is a sparse member, which is not supported")
                key, extension = match.group(1), match.group(2).lower()
                if not index.keys or key != index.keys[-1]:
                    if key in seen:
                        raise ShardError(f"{path}: the members of sample {key} do not follow one another")
                    seen.add(key)
                    index.keys.append(key)
                    index.starts.append(len(index.offsets))
                number = numbers.setdefault(extension, len(numbers))
                if number in index.extensions[index.starts[-1] :]:
                    raise ShardError(f"{path}: sample {key} has the member '{extension}' twice")
                index.extensions.append(number)
                index.offsets.append(member.offset_data)
                index.sizes.append(member.size)
            offset = tar.offset
        _check_end(path, offset, size)
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{path}: truncated or damaged near byte {offset}: {error}{_hint(path)}") from error
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {error.strerror}") from error
    index.starts.append(len(index.offsets))
    index.names = list(numbers)
    return index


def _check_end(path: Path, offset: int, size: int) -> None:
    """tarfile takes a damaged header, or none, for the end of the archive; this tells them apart."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ShardError(f"{path}: truncated at byte {size}: the mark of the archive's end is missing")
        if block.strip(b"\0"):
            raise ShardError(f"{path}: damaged header at byte {offset}")
        while rest := file.read(1 << 16):
            if rest.strip(b"\0"):
                raise ShardError(f"{path}: data after the archive's end at byte {offset}; joined or damaged?")


def _hint(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(6)
    packed = magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return "; it is compressed, and reading at random needs a plain tar: unpack it first" if packed else ""


def _read_sidecar(sidecar: Path) -> ShardIndex | None:
    """The stored index, or None where there is none of this version: it is only a cache."""
    try:
        stored = json.loads(sidecar.read_text("utf-8"))
        if stored.pop("version") != _INDEX_VERSION:
            return None
        for name, code in (("starts", "q"), ("extensions", "H"), ("offsets", "q"), ("sizes", "q")):
            stored[name] = array(code, stored[name])
        return ShardIndex(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _write_sidecar(sidecar: Path, index: ShardIndex) -> None:
    stored = {n: v.tolist() if isinstance(v, array) else v for n, v in vars(index).items()}
    temporary = sidecar.with_name(f".{sidecar.name}.{uuid4().hex}.partial")
    try:
        temporary.write_text(json.dumps({"version": _INDEX_VERSION, **stored}), "utf-8")
        temporary.replace(sidecar)
    except OSError as error:
        logger.info("%s: the index cannot be kept (%s); it is built anew each time", sidecar, error.strerror)
