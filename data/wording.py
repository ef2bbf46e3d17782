"""Numbers and foreign text as people read them."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text in one line, with what would steer a terminal written as escapes: names and contents are not ours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def byte_size(size: int) -> str:
    """ "12.3 kB": powers of 1000, three figures."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def counted(number: int, noun: str) -> str:
    """ "1 sample", "1,200 samples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
