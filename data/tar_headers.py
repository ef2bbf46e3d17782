"""What single headers of a tar say: 512 bytes each, in the layouts v7, ustar, GNU and pax."""

from __future__ import annotations

from zlib import adler32

import numpy as np

from .wording import printable

BLOCK = 512
START = 157
"""Bytes at the start of a header that say what it is of: name, size, time, the sum of all its bytes, kind."""

_OCTAL = 8 ** np.arange(10, -1, -1)
_MARK = np.frombuffer(b"ustar", np.uint8)


def has_valid_sum(header: bytes) -> bool:
    """Whether a block of 512 bytes holds the sum of its own bytes, as a header does."""
    if len(header) < BLOCK:
        return False
    field = header[148:156]
    # The low half of Adler-32 is one more than the sum of the bytes, modulo a prime that 256 bytes do not reach.
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - (adler32(field) & 0xFFFF) + 255
    try:
        if int(field[:6], 8) == total:
            return True
    except ValueError:
        pass
    stored = number(field)
    if stored == total:
        return True
    # Some old programs took the bytes for signed ones.
    return 0 < stored < total and stored == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def is_header(block: bytes) -> bool:
    """Whether a block is a header: its sum and size are valid, and it has the mark of ustar, GNU and pax headers, or
    nothing in its place, as in v7."""
    if not has_valid_sum(block) or number(block[124:136]) < 0:
        return False
    return block[257:262] == b"ustar" or not block[257:265].strip(b"\0")


def number(field: bytes) -> int:
    """A number of a header: octal, or big-endian after a marking byte. Below 0 where there is none."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return -1


def padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def shown(name: bytes | str) -> str:
    """A name for people: as it is if that is safe to print, else escaped."""
    return printable(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name)


def matters(content: bytes) -> bool:
    """Whether a pax header says something of a member's place or name; most hold but a time."""
    return b" path=" in content or b" size=" in content or b" GNU.sparse." in content


def stored_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU tar keeps times where the others have the start of a long name.
    if header[345] and header[262] != 0x20:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def pax_records(content: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEYWORD=VALUE\\n" of a pax header.

    Raises:
        ValueError: they are none.
    """
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        space = content.index(b" ", position)
        end = position + int(content[position:space])
        keyword, equals, value = content[space + 1 : max(end, space) - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            raise ValueError(f"no pax record at byte {position}")
        records[keyword] = value
        position = end
    return records


def chained(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that are headers if the first one is, and their sizes: every block (N, 512) is read as if it were a
    header with a size of eleven digits, and only those that lead from one to the next are kept."""
    digits, end = blocks[:, 124:135] - np.uint8(ord("0")), len(blocks)
    sizes = digits @ _OCTAL
    wrong = np.any(digits > 7, axis=1)
    following = np.arange(1, end + 1) + (sizes + (BLOCK - 1)) // BLOCK
    following[wrong] = end
    steps, chain, place = following.tolist(), [], 0
    while place < end:
        chain.append(place)
        place = steps[place]
    if wrong[chain[-1]]:
        del chain[-1]
    return np.array(chain, np.int64), sizes[chain]


def plain_headers(headers: np.ndarray) -> np.ndarray:
    """Which of the blocks (N, 512), with sizes of eleven digits, are marked headers with a name in one part."""
    sums = headers[:, 148:154] - np.uint8(ord("0"))
    total = headers.sum(1, dtype=np.uint32) - headers[:, 148:156].sum(1, dtype=np.uint32) + 8 * ord(" ")
    plain = (sums < 8).all(1) & (sums @ _OCTAL[-6:] == total)
    plain &= (headers[:, 257:262] == _MARK).all(1) & (headers[:, 345] == 0)
    return plain & ((headers[:, 135] == 0) | (headers[:, 135] == ord(" ")))


def say_nothing(blocks: np.ndarray, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which of the pax headers with contents at these places are short and do not matter."""
    short = (sizes <= BLOCK) & (places < len(blocks))
    contents = blocks[places[short], : sizes[short].max(initial=0)]
    if matters(contents.tobytes()):
        short[short] = [not matters(content.tobytes()) for content in contents]
    return short
