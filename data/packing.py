"""Packing sequences of different lengths into rows of one length.

Which tokens may see each other inside a row is the model's business (its `documents` argument): packing only
says which sequences share a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best fit, longest first: each sequence goes to the row with the least room that still holds it.

    Deterministic: of equal sequences the earlier goes first, of equally full rows the older is filled. Inside
    a row the sequences keep their given order, and rows are ordered by their first sequence.

    Args:
        lengths: of the sequences, each 1 .. row_length.
        row_length: of a row.

    Returns:
        For each row the indices of its sequences; every index appears once.

    Raises:
        ValueError: a length outside 1 .. row_length.
    """
    if row_length < 1:
        raise ValueError(f"row_length must be at least 1, not {row_length}")
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_length:
            raise ValueError(f"sequence {index} has length {length}, which is outside 1 .. {row_length}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = bisect_left(room, (lengths[index], -1))
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            insort(room, (left - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], row_length: int) -> float:
    """The part of the rows' positions that sequences take up, 0 .. 1; 1 for no rows."""
    used = sum(lengths[index] for row in rows for index in row)
    return used / (len(rows) * row_length) if rows else 1.0
