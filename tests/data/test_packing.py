import itertools
import random
from collections import Counter

import pytest
from herdkit.data.packing import fill, pack


def naive(lengths, row_length):
    """Best fit decreasing, word for word."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [(row_length - sum(lengths[i] for i in row), number) for number, row in enumerate(rows)]
        fitting = [entry for entry in room if entry[0] >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return sorted(sorted(row) for row in rows)


def fewest_rows(lengths, row_length):
    """By trying every partition."""

    def fits(assignment):
        rows = zip(lengths, assignment, strict=True)
        loads = Counter()
        for length, row in rows:
            loads[row] += length
        return max(loads.values()) <= row_length

    return next(
        count
        for count in itertools.count(1)
        if any(fits(assignment) for assignment in itertools.product(range(count), repeat=len(lengths)))
    )


def test_against_the_plain_algorithm():
    generator = random.Random(0)
    for _ in range(150):
        row_length = generator.randint(1, 40)
        lengths = [generator.randint(1, row_length) for _ in range(generator.randint(0, 60))]
        rows = pack(lengths, row_length)
        assert rows == naive(lengths, row_length)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= row_length for row in rows)
        assert pack(lengths, row_length) == rows


def test_near_the_optimum():
    generator = random.Random(1)
    for _ in range(15):
        lengths = [generator.randint(1, 10) for _ in range(6)]
        assert len(pack(lengths, 10)) <= 11 / 9 * fewest_rows(lengths, 10) + 6 / 9


def test_fill():
    assert fill(pack([3, 3, 4], 5), [3, 3, 4], 5) == pytest.approx(10 / 15)
    assert fill([], [], 5) == 1
    generator = random.Random(2)
    lengths = [min(2048, int(generator.lognormvariate(5, 1)) + 1) for _ in range(3000)]
    assert fill(pack(lengths, 2048), lengths, 2048) > 0.99


def test_errors():
    with pytest.raises(ValueError, match="sequence 1 has length 6"):
        pack([3, 6], 5)
    with pytest.raises(ValueError, match="sequence 0 has length 0"):
        pack([0], 5)
    with pytest.raises(ValueError, match="row_length"):
        pack([], 0)
