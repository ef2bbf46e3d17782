"""Where the members of a tar lie, read from its headers alone, and past damage.

tarfile takes a damaged header for the end of the archive and manages some ten thousand headers a second. This scan
verifies every header, says what it had to leave out and goes on at the next valid one, and is made for archives of
a million members. Layouts: v7, ustar, GNU and pax, with their long names and large sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np

from .tar_headers import (
    BLOCK,
    START,
    chained,
    is_header,
    matters,
    number,
    padded,
    pax_records,
    plain_headers,
    say_nothing,
    shown,
    stored_name,
)  # fmt: skip

MAX_EXTENDED = 1 << 24
"""Bytes of an extended header; one that claims more is taken for damaged."""

_MAX_TAIL = (1 << 20) + 1024
"""Bytes of zeros after the last member: the mark of the end, and what fills the largest of tar's usual records."""

_REGULAR, _SPARSE = frozenset(b"0\x007"), ord("S")
_DATALESS = {ord("1"): "links", ord("2"): "links", ord("5"): "directories"} | dict.fromkeys(b"346", "devices")
"""What has no data behind it, whatever size its header names."""
_LONG_NAME, _LONG_LINK, _GLOBAL = b"LKg"
_EXTENDED = frozenset(b"LKgxX")
_ZEROS = bytes(BLOCK)
_WINDOW, _CHUNK, _DENSE = 1 << 22, 1 << 20, 1 << 15
"""Bytes to read at once where headers are dense, where one is looked for; the distance of dense ones."""
_WORTH_A_RUN = 16


class Members(NamedTuple):
    """Some regular files, by columns: names, offsets and sizes of the data in bytes, CRC-32 of the header's start.

    Names are as stored: maybe not UTF-8, maybe nothing that one would want as a path.
    """

    names: list[bytes]
    offsets: list[int]
    sizes: list[int]
    headers: list[int]


class Damage(NamedTuple):
    """Something that is not as it should be.

    Args:
        offset: where, in bytes.
        reason: what, for people.
        name: the member that is wrong or lost, where that is certain.
        gap: whether members that nobody knows of may be lost here.
        hint: the name that a damaged header seems to hold.
        alone: whether the member with that name is all that is lost: the next header stands where its size says.
        skipped: bytes from `offset` on that could not be read.
    """

    offset: int
    reason: str
    name: bytes = b""
    gap: bool = True
    hint: bytes = b""
    alone: bool = False
    skipped: int = 0


Events = Generator[Members | Damage, None, int | None]
"""What was met on the way, and where to go on (None: nowhere)."""


class Source(Protocol):
    """The bytes of an archive. `read` returns less than `length` only at the end."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int, /) -> bytes: ...


class TarScan:
    """Iterates, once, over the members of an archive, some at a time, and over what is wrong with it, in order.

    Args:
        source: the archive, uncompressed.
        smallest_read: in bytes; as much as takes no longer to read than a block does.
    """

    def __init__(self, source: Source, smallest_read: int = 4096):
        self.ignored: Counter[str] = Counter()
        """How many entries are no regular files, by kind."""
        self.has_long_names = False
        """Whether some names stand outside of their headers; then that in a lone header may be a part."""
        self._end = source.size
        self._window = _Window(source, smallest_read)
        self._read = self._window.read
        self._shared: dict[bytes, bytes] = {}  # pax records for all that follows
        self._own: dict[bytes, bytes] = {}  # and those for the next member
        self._own_damaged = False
        self._extended_at: int | None = None
        self._last = (b"", 0)  # name of the member right before, and where its data begin

    def __iter__(self) -> Iterator[Members | Damage]:
        offset: int | None = 0
        singly = 0
        while offset is not None:
            if singly == 0 and self._extended_at is None and not self._shared:
                run = self._run(offset)
                if run is None:
                    singly = _WORTH_A_RUN
                else:
                    yield run
                    self._last = (run.names[-1], run.offsets[-1])
                    self._window.last = run.offsets[-1] - BLOCK
                    offset = run.offsets[-1] + padded(run.sizes[-1])
            offset = yield from self._one(offset)
            singly = max(0, singly - 1)

    def _run(self, offset: int) -> Members | None:
        """The plain members from here on that the window holds, if they are many, all verified at once.

        Does only what is common and leaves the rest, damage included, to `_one`.
        """
        window, base = self._window.bytes, self._window.base
        count = (len(window) + base - offset) // BLOCK if offset >= base else 0
        if count < _WORTH_A_RUN:
            return None
        blocks = np.frombuffer(window, np.uint8, count * BLOCK, offset - base).reshape(count, BLOCK)
        chain, sizes = chained(blocks)
        if len(chain) < _WORTH_A_RUN:
            return None
        headers = blocks[chain]
        plain = plain_headers(headers)
        places = chain * BLOCK + offset
        files, pax = headers[:, 156] == ord("0"), headers[:, 156] == ord("x")
        plain &= pax | files & (places + BLOCK + sizes <= self._end)
        if pax.any():
            plain[pax] &= say_nothing(blocks, chain[pax] + 1, sizes[pax])
        good = len(plain) if plain.all() else int(plain.argmin())
        chosen = np.flatnonzero(files[:good])
        if not len(chosen):
            return None
        names = headers[chosen, :100].view("S100").ravel().tolist()
        if b"\0" in b"".join(names):
            names = [name.partition(b"\0")[0] for name in names]
        sums = list(map(crc32, headers[chosen, :START]))
        return Members(names, (places[chosen] + BLOCK).tolist(), sizes[chosen].tolist(), sums)

    def _one(self, offset: int) -> Events:
        header = self._read(offset, BLOCK)
        if not is_header(header):
            return (yield from self._interrupted(offset, header))
        kind, size, name, flaw = header[156], number(header[124:136]), stored_name(header), ""
        data = offset + BLOCK
        if kind in _EXTENDED:
            return (yield from self._extend(offset, kind, size))
        if self._own or self._shared:
            name, size, flaw = self._by_records(name, size)
        if kind == _SPARSE:
            flaw = "is sparse, which is not supported"
            data = self._after_sparse_map(header, data)
        elif kind in _DATALESS:
            size = 0
        if data + size > self._end:
            return (yield from self._truncated(name, data))
        if self._own_damaged:  # and with it maybe the name
            yield Damage(offset, f"{shown(name)} at byte {offset} has a damaged pax header", hint=name)
        elif flaw:
            yield Damage(offset, f"{shown(name)} at byte {offset} {flaw}", name, gap=False)
        elif kind not in _REGULAR or (kind == 0 and name.endswith(b"/")):
            self.ignored[_DATALESS.get(kind, "others") if kind else "directories"] += 1
        else:
            self._last = (name, data)
            yield Members([name], [data], [size], [crc32(header[:START])])
        self._forget()
        return data + padded(size)

    def _extend(self, offset: int, kind: int, size: int) -> Events:
        """An extended header: says something of the next member, or of all that follow."""
        data = offset + BLOCK
        if size > MAX_EXTENDED or data + size > self._end:
            if size > MAX_EXTENDED:
                yield Damage(offset, f"damaged header at byte {offset}: an extended one of {size} bytes")
            else:
                yield Damage(self._end, f"truncated at byte {self._end}, inside an extended header")
            self._forget()
            return self._find_header(data)
        if kind != _GLOBAL and self._extended_at is None:
            self._extended_at = offset
        content = self._read(data, size)
        try:
            if kind == _LONG_NAME:
                self._own[b"path"] = content.partition(b"\0")[0]
                self.has_long_names = True
            elif kind == _GLOBAL:
                self._shared.update(pax_records(content))
            elif kind != _LONG_LINK and matters(content):
                self._own.update(pax_records(content))
                self.has_long_names |= b"path" in self._own
        except ValueError:
            if kind == _GLOBAL:
                yield Damage(offset, f"damaged pax header at byte {offset}, which is for all members that follow")
            else:
                self._own_damaged = True
        return data + padded(size)

    def _by_records(self, name: bytes, size: int) -> tuple[bytes, int, str]:
        """The name and size as pax records have them, and what is wrong with the member."""
        records = {**self._shared, **self._own}
        name = records.get(b"GNU.sparse.name") or records.get(b"path", b"").rstrip(b"/") or name
        if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
            return name, size, "is sparse, which is not supported"
        if b"size" in records:
            if not records[b"size"].isdigit():
                return name, size, f"has a pax header with the size {shown(records[b'size'])}"
            size = int(records[b"size"])
        return name, size, ""

    def _forget(self) -> None:
        if self._extended_at is not None:
            self._own, self._own_damaged, self._extended_at = {}, False, None

    def _after_sparse_map(self, header: bytes, data: int) -> int:
        more = header[482]
        while more:
            block = self._read(data, BLOCK)
            data += BLOCK
            more = len(block) == BLOCK and block[504]
        return data

    def _interrupted(self, offset: int, header: bytes) -> Events:
        """No header where one was due: the end of the archive, or damage."""
        lost, extended_at, last, self._last = self._own.get(b"path", b""), self._extended_at, self._last, (b"", 0)
        self._forget()
        if len(header) < BLOCK or header == _ZEROS:
            if extended_at is not None:
                reason = f"no member follows the extended header at byte {extended_at}"
                yield Damage(extended_at, reason, lost, skipped=offset - extended_at)
            return (yield from self._ended(offset, header))
        if last[0] and (inside := self._find_overrun(last[1], offset)) is not None:
            yield Damage(inside, f"bytes are missing before byte {inside}, inside {shown(last[0])}", last[0])
            return inside
        following, has_size = self._after_damaged(offset, header)
        what = "damaged header at byte"
        if offset == 0 and following is None:
            what = "truncated or damaged near byte 0: no tar header at byte"
        name, hint = stored_name(header), b""
        if header[156] not in _EXTENDED and b"." in name and name.isascii() and name.decode("ascii").isprintable():
            hint = name
        reads = f", where one can still read {shown(hint)}" if hint else ""
        damage = self._skipping(offset, following, f"{what} {offset}{reads}", lost, hint)
        yield damage._replace(alone=has_size and hint != b"")
        return following

    def _after_damaged(self, offset: int, header: bytes) -> tuple[int | None, bool]:
        """The header that follows a damaged one, and whether its size leads there."""
        data, size = offset + BLOCK, number(header[124:136])
        following, has_size = data + padded(max(size, 0)), size >= 0
        if not is_header(self._read(following, BLOCK)):
            following, has_size = self._find_header(offset), False
        elif (inside := self._find_overrun(data, following)) is not None:
            following, has_size = inside, False
        lost = self._read(offset, min(_CHUNK, (self._end if following is None else following) - offset))
        self.has_long_names |= matters(lost)
        return following, has_size

    def _ended(self, offset: int, header: bytes) -> Events:
        if self._end == 0:
            yield Damage(0, "truncated or damaged near byte 0: the file is empty")
        elif len(header) < BLOCK:
            where = "inside a header" if header.strip(b"\0") else "the mark of the archive's end is missing"
            yield Damage(self._end, f"truncated at byte {self._end}: {where}")
        elif (found := self._find_data(offset)) is not None:
            joined = found if is_header(self._read(found, BLOCK)) else self._find_header(found)
            yield self._skipping(offset, joined, f"data after the archive's end at byte {found}")
            return joined
        elif self._end - offset > _MAX_TAIL:
            reason = f"nothing but zeros from byte {offset} to the end: more than tar writes, so that something is lost"
            yield self._skipping(offset, None, reason)
        return None

    def _skipping(
        self, offset: int, following: int | None, reason: str, name: bytes = b"", hint: bytes = b""
    ) -> Damage:
        skipped = (self._end if following is None else following) - offset
        reason += f"; {skipped} bytes skipped" if skipped else ""
        return Damage(offset, reason, name, skipped=skipped, hint=hint)

    def _truncated(self, name: bytes, data: int) -> Events:
        """A member beyond the end of the file. Another archive may have been joined to the part that there is."""
        inside = self._find_header(data)
        # An aligned one belongs to an archive that is a member, as likely as not.
        if inside is not None and (inside - data) % BLOCK == 0:
            inside = None
        yield Damage(self._end, f"truncated at byte {self._end}, inside {shown(name)}", name)
        self._forget()
        self._last = (b"", 0)
        return inside

    def _find_overrun(self, start: int | None, end: int) -> int | None:
        """Of a member with its data from `start` to `end`: the header inside, if bytes are missing there.

        Headers then lead from there on beyond the end. Those of an archive that is a member itself end before.
        """
        tried: set[int] = set()
        while start is not None and (start := self._find_header(start, end)) is not None:
            place = start
            while place < end and place not in tried and is_header(header := self._read(place, BLOCK)):
                tried.add(place)
                place += BLOCK + (0 if header[156] in _DATALESS else padded(number(header[124:136])))
            if place >= end and (is_header(header := self._read(place, BLOCK)) or header in (_ZEROS, b"")):
                return start
            start += 1
        return None

    def _find_header(self, start: int, end: int | None = None) -> int | None:
        """The next header: at any byte if it is a ustar, GNU or pax one, else a whole number of blocks away."""
        end = self._end if end is None else end
        for base in range(start, end, _CHUNK):
            chunk = self._read(base, min(_CHUNK, end - base) + BLOCK - 1)
            limit = len(chunk) - BLOCK + 1
            aligned = next((i for i in range(0, limit, BLOCK) if is_header(chunk[i : i + BLOCK])), limit)
            position = chunk.find(b"ustar", 257)
            while 0 <= position < aligned + 257:
                if is_header(chunk[position - 257 : position + 255]):
                    return base + position - 257
                position = chunk.find(b"ustar", position + 1)
            if aligned < limit:
                return base + aligned
        return None

    def _find_data(self, start: int) -> int | None:
        """The first block, counted from `start`, that is not zero."""
        for base in range(start, self._end, _CHUNK):
            chunk = self._read(base, _CHUNK)
            if rest := len(chunk.lstrip(b"\0")):
                return base + (len(chunk) - rest) // BLOCK * BLOCK
        return None


class _Window:
    """Reads far ahead while headers are dense, and little where there is much data between them."""

    def __init__(self, source: Source, smallest: int):
        self.base, self.bytes = 0, b""
        self.last = 0
        """Where was read last."""
        self._source, self._smallest, self._size = source, smallest, smallest

    def read(self, offset: int, length: int) -> bytes:
        start, hop, self.last = offset - self.base, offset - self.last, offset
        if start >= 0 and len(found := self.bytes[start : start + length]) == length:
            return found
        dense = 0 <= hop <= max(_DENSE, self._smallest)
        self._size = min(2 * self._size, max(_WINDOW, self._smallest)) if dense else self._smallest
        self.base, self.bytes = offset, self._source.read(offset, max(length, self._size))
        return self.bytes[:length]
