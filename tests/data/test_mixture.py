import math
import random
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
