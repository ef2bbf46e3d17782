"""Shards behind a URL, read in ranges through fsspec, with patience and a local cache."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from .byte_cache import ByteCache, CacheFullError, Writable

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5
FIRST_WAIT = 0.5
"""Seconds, more or less, before the second attempt; doubled before each that follows."""
CACHE_BLOCK = 1 << 18
"""Bytes that are fetched and kept together: hardly slower than the few that are asked for."""
_STREAM = 4 << 20
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "last_modified")
_PERMANENT = frozenset({errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.ENOTEMPTY})
_DROPPED = {("aiohttp", "ClientError"), ("botocore", "HTTPClientError"), ("urllib3", "HTTPError")}
"""Errors of connections, by the package and the name of the class."""


class RemoteFile:
    """A file behind a URL of any protocol of fsspec.

    Answers of 5xx or 429, dropped connections and time-outs are tried again, `ATTEMPTS` times in all, with growing
    waits. From a web server without range requests the whole file is downloaded, once, and read from the cache.

    Args:
        url: with its protocol.
        cache: for what is read.
        options: fsspec's storage options, such as `{"anon": True}`.

    Raises:
        OSError: also from `read` and `fetch`: it does not exist, may not be read, or does not answer.
        ModuleNotFoundError: the protocol needs a package that is not installed.
    """

    step = 1 << 20
    """Bytes that take hardly longer than a few."""

    def __init__(self, url: str, cache: ByteCache, options: Mapping[str, Any] | None = None):
        self.name, self._cache, self.options = url, cache, with_defaults(url, options or {})
        info = self._patiently(lambda fs, path: fs.info(path))
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if info.get("size") is None:
            raise OSError("the server does not tell its size")
        self.size = int(info["size"])
        self.version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        """ETag, time of change or the like; "" if the server tells none."""
        self._has_ranges: bool | None = None if url.startswith(("http://", "https://")) else True
        self._cannot_keep = False

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from the cache, or fetched into it; fewer than `length` only at the end of the file."""
        end = min(offset + length, self.size)
        if end <= offset:
            return b""
        first, last = offset // CACHE_BLOCK, (end - 1) // CACHE_BLOCK
        blocks = [self._cache.get(self._block_name(i)) for i in range(first, last + 1)]
        if None in blocks and not self._check_ranges():
            return self._from_whole(offset, end - offset)
        for missing, stretch in groupby(range(len(blocks)), lambda i: blocks[i] is None):
            if missing:
                numbers = list(stretch)
                start = (first + numbers[0]) * CACHE_BLOCK
                content = self._ranged(start, min(len(numbers) * CACHE_BLOCK, self.size - start))
                for i, number in enumerate(numbers):
                    blocks[number] = block = content[i * CACHE_BLOCK : (i + 1) * CACHE_BLOCK]
                    self._keep(self._block_name(first + number), block)
        content = b"".join(block or b"" for block in blocks)
        return content[offset - first * CACHE_BLOCK : end - first * CACHE_BLOCK]

    def fetch(self, offset: int, length: int) -> bytes:
        """The same past the cache, for what is read but once."""
        return self.fetch_all([offset], length)[0]

    def fetch_all(self, offsets: Sequence[int], length: int) -> list[bytes]:
        """Several at once, past the cache."""
        spans = [(offset, max(offset, min(offset + length, self.size))) for offset in offsets]
        if not self._check_ranges():
            return [self._from_whole(start, end - start) for start, end in spans]
        if len(spans) == 1:
            return [self._ranged(start, end - start) for start, end in spans]

        def ask(fs: Any, path: str) -> list[bytes]:
            starts, ends = ([span[i] for span in spans] for i in range(2))
            contents = fs.cat_ranges([path] * len(spans), starts, ends, on_error="return")
            return [_complete(content, end - start) for (start, end), content in zip(spans, contents, strict=True)]

        return self._patiently(ask)

    def _ranged(self, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        return self._patiently(lambda fs, path: _complete(fs.cat_file(path, start=start, end=start + length), length))

    def _check_ranges(self) -> bool:
        if self._has_ranges is None:
            self._has_ranges = self.size < 2 or self._patiently(self._probe)
            if not self._has_ranges:
                where = self._cache.folder
                logger.warning(
                    "%s: the server has no range requests; it is downloaded whole, into %s", self.name, where
                )
        return self._has_ranges

    def _probe(self, fs: Any, path: str) -> bool:
        try:
            with fs.open(path, "rb", block_size=CACHE_BLOCK, cache_type="none", size=self.size) as file:
                file.seek(self.size - 1)
                file.read(1)
        except ValueError:  # so fsspec says that the whole file came instead
            return False
        return True

    def _from_whole(self, offset: int, length: int) -> bytes:
        name = f"whole {self.name} {self.size} {self.version}"
        while (content := self._cache.get(name, offset, length)) is None:
            self._patiently(lambda fs, path: self._cache.make(name, lambda entry: self._download(fs, path, entry)))
        return content

    def _download(self, fs: Any, path: str, entry: Writable) -> None:
        count = 0
        with fs.open(path, "rb", block_size=0) as file:
            while content := file.read(_STREAM):
                count += len(content)
                entry.write(content)
        if count != self.size:
            raise ConnectionError(f"{count} bytes came instead of {self.size}")

    def _block_name(self, i: int) -> str:
        return f"block {self.name} {self.size} {self.version} {CACHE_BLOCK} {i}"

    def _keep(self, name: str, content: bytes) -> None:
        try:
            self._cache.put(name, content)
        except OSError as error:
            if not self._cannot_keep:
                logger.warning("%s: what is read cannot be kept: %s", self.name, error)
            self._cannot_keep = True

    def _patiently(self, ask: Callable[[Any, str], T]) -> T:
        return patiently(self.name, self.options, ask)


def patiently(url: str, options: Mapping[str, Any], ask: Callable[[Any, str], T]) -> T:
    """Calls `ask` with the file system and the path that a URL names, and again after errors that may pass.

    Raises:
        OSError: the last error, in words.
        ModuleNotFoundError: the protocol needs a package that is not installed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # Cached by fsspec, and made anew in a forked process, where its threads are gone.
            fs, path = url_to_fs(url, **options)
            return ask(fs, path)
        except CacheFullError:
            raise
        except Exception as error:
            cause = _cause(error)
            if not _may_pass(cause):
                raise _in_words(url, cause) from error
            if attempt == ATTEMPTS:
                raise OSError(f"no answer after {ATTEMPTS} attempts: {_text(cause)}") from error
            wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            logger.info("%s: %s; tried again in %.1f s", url, _text(cause), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def with_defaults(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options, and where they say nothing else: for web servers time-outs of a silent connection in place of
    one of the whole transfer, for S3 no further patience below ours."""
    if url.startswith("s3"):
        return {**options, "config_kwargs": {"retries": {"max_attempts": 0}, **options.get("config_kwargs", {})}}
    if not url.startswith(("http://", "https://")):
        return dict(options)
    try:
        from aiohttp import ClientTimeout
    except ModuleNotFoundError:
        return dict(options)  # fsspec's own error says what is missing
    client = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60), **options.get("client_kwargs", {})}
    # A server that compresses on the way would count other bytes than those of the file.
    headers = {"Accept-Encoding": "identity", **options.get("headers", {})}
    return {**options, "client_kwargs": client, "headers": headers}


def _complete(content: bytes | BaseException, length: int) -> bytes:
    if isinstance(content, BaseException):
        raise content
    if len(content) != length:
        raise ConnectionError(f"{len(content)} bytes came instead of {length}")
    return content


def _cause(error: BaseException) -> BaseException:
    """Of a file that fsspec did not find at a web server: why, since that may be any error."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and type(cause).__module__.startswith("aiohttp"):
        return error if getattr(cause, "status", 0) == 404 else cause
    return error


def _may_pass(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return isinstance(error, EOFError) or (bool(kinds & _DROPPED) and not isinstance(error, ValueError))


def _in_words(url: str, error: BaseException) -> Exception:
    if isinstance(error, ImportError):
        return ModuleNotFoundError(f'{url}: {error}; herdkit\'s extra "remote" has what http and s3 need')
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "No such file")
    if isinstance(error, OSError):
        return error
    return OSError(_text(error))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
