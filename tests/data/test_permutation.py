import itertools
import math
import random
import time
from collections import Counter

import numpy as np
import pytest
from herdkit.data.permutation import Permutation, permutation


def order(length, *key):
    return Permutation(length, *key).many(np.arange(length))


def chi_squared(counts, expected):
    counts = np.asarray(counts, float)
    return ((counts - expected) ** 2 / expected).sum()


def limit(degrees):
    """What chi squared of so many degrees of freedom exceeds once in 100,000 times (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


LENGTHS = [*range(1, 60), 97, 100, 121, 127, 1009, 65_535, 65_536, 65_537, 65_539, 257**2, 257**2 + 1]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_number_comes_once(seed):
    for length in LENGTHS:
        assert np.array_equal(np.sort(order(length, seed)), np.arange(length)), length


def test_ten_million_come_once():
    length = 10**7 + 19
    seen = np.zeros(length, bool)
    permuted = Permutation(length, "large")
    for start in range(0, length, 1 << 16):
        seen[permuted.many(np.arange(start, min(start + (1 << 16), length)))] = True
    assert seen.all()


@pytest.mark.parametrize("length", [1, 2, 3, 50, 1000, 65_536, 10**6 + 3, 10**10, 1 << 63])
def test_one_and_many_are_the_same(length):
    generator = random.Random(length)
    places = [0, length - 1, *(generator.randrange(length) for _ in range(200))]
    permuted = Permutation(length, 7, "a", 0)
    found = permuted.many(np.array(places).reshape(2, -1))
    assert found.dtype == np.int64
    assert found.ravel().tolist() == [permuted[place] for place in places]
    assert all(0 <= number < length for number in found.ravel().tolist())


def test_the_order_is_the_same_in_every_version():
    # Found once and kept: a run must go on in the same order after an upgrade.
    assert order(12, 5, "web", 0).tolist() == [3, 0, 10, 2, 4, 5, 11, 6, 1, 7, 8, 9]
    assert [Permutation(10**10, 5, "web", 3)[place] for place in (0, 1, 10**9)] == [4825152329, 9379664070, 6455286701]
    assert permutation(70_000, 5, "web", 0).many(np.arange(4)).tolist() == [40223, 18193, 9731, 63291]


def test_places_outside():
    assert len(Permutation(0)) == 0
    for permuted, place in [(Permutation(0), 0), (Permutation(5), 5), (Permutation(5), -1)]:
        with pytest.raises(IndexError, match=f"place {place} of {len(permuted)}"):
            permuted[place]
        with pytest.raises(IndexError, match="outside"):
            permuted.many(np.array([place]))
    assert Permutation(0).many(np.arange(0)).tolist() == []
    with pytest.raises(ValueError, match="length"):
        Permutation(-1)


def test_all_orders_of_four_are_equally_likely():
    draws = 12_000
    found = Counter(
        tuple(map(permuted.__getitem__, range(4))) for permuted in map(Permutation, [4] * draws, range(draws))
    )
    counts = [found[one] for one in itertools.permutations(range(4))]
    assert chi_squared(counts, draws / 24) < limit(23)


def test_every_number_is_equally_likely_at_every_place():
    length, draws = 53, 2000
    drawn = np.stack([order(length, "even", seed) for seed in range(draws)])
    counts = np.stack([np.bincount(drawn[:, place], minlength=length) for place in range(length)])
    assert chi_squared(counts, draws / length) * (length - 1) / length < limit((length - 1) ** 2)
    # What follows a number is as random as the number: all differences but 0, in a row and in a column of the halves.
    for apart in (1, 7):
        differences = np.bincount(((drawn[:, apart:] - drawn[:, :-apart]) % length).ravel(), minlength=length)
        assert differences[0] == 0
        assert chi_squared(differences[1:], differences.sum() / (length - 1)) < limit(length - 2)


@pytest.mark.parametrize("length", [1000, 70_000])
def test_it_shuffles_as_well_as_numpy(length):
    places, draws = np.arange(length), 20
    generator = np.random.default_rng(0)
    ours = [order(length, "shuffled", seed) for seed in range(draws)]
    theirs = [generator.permutation(length) for _ in range(draws)]
    # Standard errors for `draws` permutations: of the mean displacement length / 3 x sqrt(0.4 / length), of Poisson
    # counts their square root.
    for measure, error in [
        (lambda p: np.abs(p - places).mean() / length, math.sqrt(0.4 / length) / 3),
        (lambda p: (np.diff(p) == 1).sum(), 1),
        (lambda p: (p == places).sum(), 1),
        (lambda p: np.corrcoef(p, places)[0, 1], 1 / math.sqrt(length)),
        (lambda p: np.corrcoef(p[1:], p[:-1])[0, 1], 1 / math.sqrt(length)),
    ]:
        difference = np.mean([measure(p) for p in ours]) - np.mean([measure(p) for p in theirs])
        assert abs(difference) < 4.5 * error * math.sqrt(2 / draws)


def test_other_keys_give_orders_that_know_nothing_of_each_other():
    length = 5000
    base = order(length, 0, "web", 0)
    for key in [(0, "web", 1), (1, "web", 0), (0, "code", 0), (0, "we", "b0")]:
        other = order(length, *key)
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / math.sqrt(length)
        assert (base == other).sum() < 9
        assert abs((np.diff(base) * np.diff(other)).mean()) / length**2 < 4.5 * 0.2 / math.sqrt(length)


def test_a_place_of_ten_thousand_million_costs_nothing_before_it():
    start = time.perf_counter()
    assert Permutation(10**10, "far")[10**10 - 1] < 10**10
    assert time.perf_counter() - start < 0.05
