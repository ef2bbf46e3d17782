import math
import random
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from herdkit.data.mixture import MAX_PERIOD, Mixture
from herdkit.data.shards import Sample


def source(name, length):
    return [Sample(f"{index}", name, {}) for index in range(length)]


def mixture(*parts):
    return Mixture([(name, source(name, length), weight) for name, length, weight in parts])


def test_proportions_are_exact_at_every_prefix():
    generator = random.Random(0)
    for _ in range(15):
        count = generator.randint(1, 12)
        weights = [generator.choice([1, 2, 3, 7, 0.5, 0.1, 0.25, 12.5]) for _ in range(count)]
        mixed = mixture(*((f"{i}", 5, weight) for i, weight in enumerate(weights)))
        shares = [Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights]
        assert mixed.weights == shares
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        drawn = [0] * count
        for position in range(500):
            drawn[mixed.locate(position, 0).source] += 1
            assert all(abs(drawn[i] * scale - (position + 1) * whole[i]) < scale for i in range(count))


def test_weights_without_a_small_common_denominator_are_rounded():
    mixed = mixture(("a", 3, 123_457.0), ("b", 3, 98_765.0), ("c", 3, 1e-9))
    assert sum(mixed.weights) == 1
    assert mixed.weights[2] == Fraction(1, MAX_PERIOD)
    assert float(mixed.weights[0]) == pytest.approx(123_457 / 222_222, abs=2 / MAX_PERIOD)
    for start in [0, 3 * MAX_PERIOD, 10**12 * MAX_PERIOD]:
        drawn = Counter(mixed.locate(start + position, 0).source for position in range(2000))
        assert all(abs(drawn[i] - 2000 * weight) < 1 for i, weight in enumerate(mixed.weights))
    assert mixture(("a", 1, 1 / 3), ("b", 1, 1 / 3)).weights == [Fraction(1, 2)] * 2


def test_every_sample_comes_once_in_each_pass():
    mixed = mixture(("a", 7, 2), ("b", 5, 1), ("c", 11, 0.5))
    seen = {}
    for position in range(700):
        place = mixed.locate(position, seed=3)
        seen.setdefault((place.source, place.epoch), []).append(place.index)
    lengths = [7, 5, 11]
    for (number, epoch), indices in seen.items():
        is_last = epoch == max(e for n, e in seen if n == number)
        assert len(set(indices)) == len(indices)
        assert is_last or sorted(indices) == list(range(lengths[number]))
    assert seen[0, 0] != seen[0, 1]


def test_any_position_alone():
    mixed = mixture(("a", 7, 2), ("b", 5, 1.5))
    forward = [mixed.locate(position, 1) for position in range(400)]
    order = list(range(400))
    random.Random(0).shuffle(order)
    again = mixture(("a", 7, 2), ("b", 5, 1.5))
    assert {position: again.locate(position, 1) for position in order} == dict(enumerate(forward))
    far = 10**15 + 12_345
    place = mixed.locate(far, 1)
    draws = far * [Fraction(4, 7), Fraction(3, 7)][place.source]
    assert place.epoch == pytest.approx(float(draws / [7, 5][place.source]), abs=1)


def test_the_order_is_the_same_in_every_version():
    mixed = mixture(("a", 6, 2), ("b", 4, 1))
    places = [(p.source, p.epoch, p.index) for p in (mixed.locate(position, 5) for position in range(12))]
    # Found once and kept: a run must go on in the same order after an upgrade.
    assert places == [
        (0, 0, 4),
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 5),
        (0, 0, 1),
        (1, 0, 1),
        (0, 0, 2),
        (0, 0, 3),
        (1, 0, 2),
        (0, 1, 1),
        (0, 1, 4),
        (1, 0, 3),
    ]


def test_shuffling_depends_on_seed_name_and_epoch_and_is_even():
    def first_pass(name, seed, epoch=0):
        alone = mixture((name, 1000, 1))
        return [alone.locate(epoch * 1000 + position, seed).index for position in range(1000)]

    base = first_pass("a", 0)
    for other in [first_pass("b", 0), first_pass("a", 1), first_pass("a", 0, epoch=1)]:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.15
    assert abs(np.corrcoef(base, range(1000))[0, 1]) < 0.15
    # Positions of one sample over many seeds are even: chi squared with 9 degrees of freedom, p = 0.001.
    small = mixture(("a", 10, 1))
    counts = Counter(small.locate(0, seed).index for seed in range(2000))
    assert sum((counts[i] - 200) ** 2 / 200 for i in range(10)) < 27.9


def test_sources_do_not_disturb_each_other():
    alone = mixture(("a", 9, 1))
    mixed = mixture(("b", 4, 3), ("a", 9, 1))
    of_a = [place.index for p in range(400) if (place := mixed.locate(p, 2)).source == 1]
    assert of_a == [alone.locate(position, 2).index for position in range(len(of_a))]


def limited(*parts, drawn=None):
    """Parts are (name, length, weight, epochs)."""
    sources = [(name, source(name, length), weight) for name, length, weight, _ in parts]
    return Mixture(sources, drawn, {name: epochs for name, _, _, epochs in parts})


def walked(parts):
    """The order of limited sources, and where segments begin, by drawing one position after another."""
    left = {
        name: None if epochs is None else math.floor(Fraction(str(epochs)) * length)
        for name, length, _, epochs in parts
    }
    order, starts, position = [], [0], 0
    while any(n != 0 for n in left.values()) and len(order) < 3000:
        of = [(name, length, weight) for name, length, weight, _ in parts if left[name] != 0]
        names = [name for name, _, _ in of]
        name = names[mixture(*of).locate(position, 0).source]
        order.append(name)
        position += 1
        if left[name] is not None:
            left[name] -= 1
            if left[name] == 0:
                starts.append(len(order))
                position = 0
    return order, starts


LIMITED = [
    [("a", 7, 1, 2.5)],
    [("a", 10, 3, 1), ("b", 10, 1, 1)],
    [("a", 10, 3, 1), ("b", 10, 1, 1.9), ("c", 40, 1, 0.5)],
    [("a", 11, 0.3, 2), ("b", 5, 0.6, 7.3), ("c", 8, 0.1, 0.9), ("d", 3, 12.5, 40)],
    [("a", 11, 0.3, 2), ("b", 5, 0.6, None), ("c", 8, 0.1, 0.9)],
]


@pytest.mark.parametrize("parts", LIMITED)
def test_limited_sources_leave_their_share_to_the_others(parts):
    order, starts = walked(parts)
    mixed = limited(*parts)
    names = [part[0] for part in parts]
    endless = any(part[3] is None for part in parts)
    assert mixed.end == (None if endless else len(order))
    assert [names[mixed.locate(position, 0).source] for position in range(len(order))] == order
    # Exact within each segment, by the weights of those that are left.
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        left = set(order[start:])
        total = sum(Fraction(str(weight)) for name, _, weight, _ in parts if name in left)
        for name, _, weight, _ in parts:
            share = Fraction(str(weight)) / total if name in left else 0
            for position in range(start, stop + 1):
                assert abs(order[start:position].count(name) - share * (position - start)) < 1
    counts = Counter(order)
    for name, length, _, epochs in parts:
        assert epochs is None or counts[name] == math.floor(Fraction(str(epochs)) * length)


@pytest.mark.parametrize("parts", LIMITED)
def test_limits_do_not_change_what_a_source_gives_nor_need_what_came_before(parts):
    mixed, names = limited(*parts), [part[0] for part in parts]
    end = mixed.end or 500
    forward = [mixed.locate(position, 1) for position in range(end)]
    for number, (name, length, weight, _) in enumerate(parts):
        alone = mixture((name, length, weight))
        of_source = [(place.epoch, place.index) for place in forward if place.source == number]
        assert of_source == [(p.epoch, p.index) for p in (alone.locate(i, 1) for i in range(len(of_source)))]
    for position in [end - 1, 0, end // 2]:
        assert limited(*parts).locate(position, 1) == forward[position]
        assert limited(*parts).drawn(position) == {
            name: sum(place.source == number for place in forward[:position]) for number, name in enumerate(names)
        }
    # It goes on where another mixture stopped, its limits included.
    for stop in (0, 3, end // 2, end):
        rest = limited(*parts, drawn=mixed.drawn(stop))
        assert rest.end == (None if mixed.end is None else end - stop)
        if mixed.end is not None:
            later = [rest.locate(position, 1) for position in range(rest.end)]
            assert sorted(map(repr, later + forward[:stop])) == sorted(map(repr, forward))


def test_limited_sources_end():
    mixed = limited(("a", 4, 1, 1), ("b", 6, 1, 0.5))
    assert [mixed.end, mixed.drawn(7)] == [7, {"a": 4, "b": 3}]
    for position in (7, 8, 10**9):
        with pytest.raises(IndexError, match=r"outside 0 \.\. 6"):
            mixed.locate(position, 0)
    ended = limited(("a", 4, 1, 1), drawn={"a": 4})
    assert [ended.end, ended.drawn(0)] == [0, {"a": 4}]
    with pytest.raises(IndexError):
        ended.locate(0, 0)
    for epochs in (0, -1, math.inf, 0.2):
        with pytest.raises(ValueError, match=r"source a: .* epochs of 4 samples hold no sample"):
            limited(("a", 4, 1, epochs))


def test_a_far_position_of_limited_sources_is_found_at_once():
    class Large:
        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

    parts = [(f"{i}", Large(10**8 + 977 * i), 1.37**i) for i in range(12)]
    start = time.perf_counter()
    mixed = Mixture(parts, epochs={f"{i}": 2.5 for i in range(12)})
    assert mixed.end == sum(int(2.5 * len(reader)) for _, reader, _ in parts)
    last = mixed.locate(mixed.end - 1, 0)
    assert last.epoch == 2
    assert mixed.drawn(mixed.end) == {name: int(2.5 * len(reader)) for name, reader, _ in parts}
    assert time.perf_counter() - start < 5


def test_shift_goes_round_the_pass():
    mixed = mixture(("a", 5, 1), ("b", 3, 1))
    place = mixed.locate(2, 0)
    around = [mixed.locate(2, 0, shift).index for shift in range(5)]
    assert place.source == 0
    assert sorted(around) == list(range(5))
    assert mixed.locate(2, 0, 5) == place
    assert mixed.sample(2, 0, 1).key == str(around[1])


def test_errors():
    with pytest.raises(ValueError, match="at least one"):
        Mixture([])
    with pytest.raises(ValueError, match="source a: the name is used twice"):
        mixture(("a", 1, 1), ("a", 1, 1))
    with pytest.raises(ValueError, match="source b: holds no samples"):
        mixture(("a", 1, 1), ("b", 0, 1))
    for weight in [0, -1, math.nan, math.inf]:
        with pytest.raises(ValueError, match="source a: the weight must be positive"):
            mixture(("a", 1, weight))
    with pytest.raises(IndexError):
        mixture(("a", 1, 1)).locate(-1, 0)
