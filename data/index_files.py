"""Keeps the indexes of shards, and finds out whether one is of the shard as it is now.

An index lies beside its shard, or in a folder of its own under the shard's name and fingerprint (of a remote one: its
ETag or the like), wherever the shard is. It is taken as it is if size, time of change (or ETag) and fingerprint agree.
If only the time differs, as after `cp` and `touch`, the headers of a local shard are read again, since a fingerprint of
pieces may miss a small change; a remote shard has another time in every place and is taken for the same. Anything else
makes it another shard. And every read of a sample compares the headers on its way with the index.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

from .byte_cache import ByteCache
from .faults import Fault, ShardError
from .remote_files import RemoteFile, patiently
from .sample_scan import scan_samples
from .shard_files import GunzippedFile, ShardFile
from .shard_index import INDEX_SUFFIX, ShardIndex, Stamp

logger = logging.getLogger(__name__)

_PIECES, _PIECE = 8, 512
_UNREADABLE = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def load_index(
    file: ShardFile,
    cache: ByteCache,
    folder: str | os.PathLike | None = None,
    *,
    rebuild: bool = False,
    beside_remote: bool = False,
) -> ShardIndex:
    """The kept index if it is of the shard as it is now, else one made and, if possible, kept.

    Args:
        file: the shard as it is stored.
        cache: for the content of compressed shards and the indexes of remote ones.
        folder: of the indexes; default: beside each shard.
        rebuild: makes it anew in any case.
        beside_remote: writes the index of a remote shard beside it, not into the cache.

    Raises:
        OSError: the shard cannot be read.
        ShardError: with `beside_remote`, that the index cannot be written.
    """
    if isinstance(file, RemoteFile) and not file.version:
        file.version = f"content {fingerprint(file)}"
    index = None if rebuild else _kept(file, cache, folder)
    if index is None:
        index = scan_shard(file, cache)
        _keep(index, file, cache, folder, beside_remote)
    return index


def scan_shard(file: ShardFile, cache: ByteCache) -> ShardIndex:
    """Indexes a shard as far as it can be read: its good samples, and `faults` for what had to be left out.

    Raises:
        OSError: it cannot be read at all, or it is compressed and its content is larger than the cache.
    """
    stamp = Stamp(file.size, file.version, fingerprint(file))
    start = file.fetch(0, 6)
    for magic, name in _UNREADABLE.items():
        if start.startswith(magic):
            reason = f"it is compressed with {name}, which is not read at random; unpack it, or use gzip"
            index = scan_samples(_Empty(), file.name, stamp)
            return replace(index, faults=[Fault(file.name, 0, reason)])
    if not start.startswith(b"\x1f\x8b"):
        return scan_samples(_Once(file), file.name, stamp, smallest_read=file.step)
    content = GunzippedFile(file, cache)
    index = scan_samples(content, file.name, stamp, "gzip", content.step)
    if content.damage:
        index.faults.append(Fault(file.name, content.size, content.damage))
    return index


def fingerprint(file: ShardFile) -> str:
    """Of the size and of some pieces of the content, as stored."""
    places = [i * max(0, file.size - _PIECE) // (_PIECES - 1) for i in range(_PIECES)]
    digest = blake2b(str(file.size).encode(), digest_size=8)
    for piece in file.fetch_all(places, _PIECE):
        digest.update(piece)
    return digest.hexdigest()


class _Once:
    """A file that is read but this time, past the cache."""

    def __init__(self, file: ShardFile):
        self.size, self.read = file.size, file.fetch


class _Empty:
    size = 1024

    def read(self, offset: int, length: int) -> bytes:
        return bytes(min(length, self.size - offset))


def _kept(file: ShardFile, cache: ByteCache, folder: str | os.PathLike | None) -> ShardIndex | None:
    if isinstance(file, RemoteFile) and folder is None:
        return _kept_of_remote(file, cache)
    place = _place(file, folder)
    index = _open(place, file)
    if index is None and folder is not None:
        name = place.name.removesuffix(INDEX_SUFFIX).rpartition(".")[0]
        others = [path.name for path in Path(folder).glob("*") if path.name.startswith(f"{name}.")]
        if others:
            logger.info("%s: no index there is of its content as it is now, but there is %s", file.name, others[0])
    return index


def _kept_of_remote(file: RemoteFile, cache: ByteCache) -> ShardIndex | None:
    name = f"index {file.name} {file.size} {file.version}"
    if (kept := cache.path(name)) is not None and (index := _open(kept, file)) is not None:
        return index
    if "?" in file.name:  # a signed URL is of that file alone
        return None
    try:
        content: bytes = patiently(file.name, file.options, lambda fs, path: fs.cat_file(path + INDEX_SUFFIX))
    except OSError:  # none there, or none that may be seen, which is no matter
        return None
    index = _checked(file.name + INDEX_SUFFIX, file, lambda: ShardIndex.from_bytes(content, file.name))
    if index is not None:
        _put(cache, name, content)
    return index


def _open(place: Path, file: ShardFile) -> ShardIndex | None:
    return _checked(place, file, lambda: ShardIndex.open(place, file.name))


def _checked(place: Any, file: ShardFile, read: Any) -> ShardIndex | None:
    """The index that `read` gives if it is of the file; else it is said why not."""
    try:
        index: ShardIndex = read()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read: %s; the shard is indexed anew", place, error.strerror)
        return None
    except ValueError as error:
        logger.warning("%s: %s; the shard is indexed anew", place, error)
        return None
    stamp, remote = index.stamp, isinstance(file, RemoteFile)
    if stamp.size != file.size:
        logger.warning("%s: is of a shard of %d bytes, not of %d; it is indexed anew", place, stamp.size, file.size)
        return None
    if remote and stamp.version == file.version:
        return index
    if stamp.fingerprint != fingerprint(file):
        logger.warning("%s: is of another shard, or of another state of it; it is indexed anew", place)
        return None
    if stamp.version != file.version and not remote:
        logger.info("%s: its shard has another time of change (touched? copied?); it is indexed anew", place)
        return None
    return index


def _keep(
    index: ShardIndex, file: ShardFile, cache: ByteCache, folder: str | os.PathLike | None, beside_remote: bool
) -> None:
    content = index.to_bytes()
    if isinstance(file, RemoteFile) and folder is None:
        if beside_remote:
            try:
                patiently(file.name, file.options, lambda fs, path: fs.pipe_file(path + INDEX_SUFFIX, content))
            except (OSError, NotImplementedError) as error:
                reason = f"the index cannot be written beside it ({error}); name a folder for it"
                raise ShardError(f"{file.name}: {reason}") from error
        else:
            _put(cache, f"index {file.name} {file.size} {file.version}", content)
        return
    place = _place(file, folder)
    temporary = place.with_name(f".{uuid4().hex}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s), so that the index is made anew each time; name another folder for indexes",
            place, error.strerror,
        )  # fmt: skip


def _put(cache: ByteCache, name: str, content: bytes) -> None:
    try:
        cache.put(name, content)
    except OSError as error:
        logger.warning("an index cannot be cached, so that it is made anew each time: %s", error)


def _place(file: ShardFile, folder: str | os.PathLike | None) -> Path:
    if folder is None:
        return Path(file.name + INDEX_SUFFIX)
    # The fingerprint tells apart shards of one name, and stays the same where the shards are moved.
    name = re.sub(r"[^\w.-]", "_", file.name.partition("?")[0].rpartition("/")[2])[:120]
    if isinstance(file, RemoteFile):  # without another request
        tag = blake2b(f"{file.size} {file.version}".encode(), digest_size=8).hexdigest()
    else:
        tag = fingerprint(file)
    return Path(folder) / f"{name}.{tag}{INDEX_SUFFIX}"
