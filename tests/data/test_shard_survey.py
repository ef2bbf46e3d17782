import random
import statistics
import tarfile

import numpy as np
import pytest
from herdkit.data.shard_survey import Spread, as_text, damaged_samples, histogram, survey_shards
from herdkit.data.shards import ShardError, ShardReader, ShardWriter


@pytest.fixture
def shards(tmp_path):
    rng = random.Random(0)
    with ShardWriter(tmp_path / "s-%d.tar", max_count=40) as writer:
        for i in range(100):
            members = {"bin": rng.randbytes(rng.randrange(3000)), "txt": "x" * (i + 1)}
            writer.write(f"f/{i:03d}", members if i % 4 else {"txt": members["txt"]})
    return writer.shards


def test_against_tarfile(shards):
    sizes, samples = {}, {}
    for path in shards:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                sizes.setdefault(extension, []).append(member.size)
                samples[key] = samples.get(key, 0) + member.size
    found = survey_shards(shards)
    assert (found.shards, found.samples, found.damaged) == (shards, 100, [])
    assert list(found.members) == ["bin", "txt"]
    for extension, numbers in [*sizes.items(), (None, list(samples.values()))]:
        spread = found.sizes if extension is None else found.members[extension]
        assert (spread.count, spread.total) == (len(numbers), sum(numbers))
        assert (spread.least, spread.most) == (min(numbers), max(numbers))
        assert spread.median == int(statistics.median(numbers))


@pytest.mark.parametrize(
    "numbers", [[7], [0], [0, 0, 1], [95, 100, 105], range(1000), [1, 10**12], [3, 5, 200], [0, 10**6]]
)
def test_bins_hold_every_number_once(numbers):
    numbers = list(numbers)
    bins = Spread.of(numbers).bins
    assert len(bins) <= 40
    assert [high for _, high, _ in bins[:-1]] == [low for low, _, _ in bins[1:]]
    for low, high, count in bins:
        assert count == sum(low <= number < high for number in numbers)
    assert sum(count for _, _, count in bins) == len(numbers)
    assert bins[0][2]
    assert bins[-1][2]


def test_bars_are_as_long_as_the_counts():
    rng = np.random.default_rng(0)
    spread = Spread.of(rng.integers(0, 50, 10_000) // rng.integers(1, 4, 10_000))
    lines = histogram(spread)
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert counts == [count for _, _, count in spread.bins]
    for line, count in zip(lines, counts, strict=True):
        assert abs(line.count("█") - 40 * count / max(counts)) <= 1
    assert lines[0].split()[:3] == ["0", "..", "1"]


def test_text(shards):
    lines = as_text(survey_shards(shards)).splitlines()
    assert lines[0].startswith("3 shards, 100 samples, ")
    assert lines[2].split() == ["member", "count", "least", "median", "most", "total"]
    assert lines[4].split() == ["txt", "100", "1", "B", "50", "B", "100", "B", "5.05", "kB"]
    assert "sizes of samples" in lines


def test_damaged_shards_are_listed(shards, tmp_path):
    shards[1].write_bytes(b"no tar" * 1000)
    found = survey_shards(str(tmp_path / "s-{0..3}.tar"))
    assert (found.shards, found.samples) == ([shards[0], shards[2]], 60)
    assert [problem.where for problem in found.damaged] == [str(shards[1]), str(tmp_path / "s-3.tar")]
    assert "No such file" in found.damaged[1].reason
    with pytest.raises(ShardError, match="no shards there"):
        survey_shards(str(tmp_path / "t-*.tar"))


def test_no_samples(tmp_path):
    tarfile.open(tmp_path / "e.tar", "w").close()
    found = survey_shards(tmp_path)
    assert (found.samples, found.members, found.sizes) == (0, {}, None)
    assert as_text(found).startswith("1 shard, 0 samples, 0 B")


def test_find(shards):
    reader = ShardReader(shards)
    for i in (0, 39, 40, 99):
        assert reader[reader.find(f"f/{i:03d}")].key == f"f/{i:03d}"
    with pytest.raises(LookupError, match="no sample has the key '7'"):
        reader.find("7")


def test_damaged_samples(tmp_path):
    with ShardWriter(tmp_path / "%d.tar") as writer:
        writer.write("a", {"txt": "fine", "npy": b"\xff"})
        writer.write("b", {"txt": b"\xff", "json": "{", "png": b"no picture"})
    seen = []
    problems = list(damaged_samples(ShardReader(tmp_path), seen.append))
    assert [(problem.key, problem.reason[:14]) for problem in problems] == [
        ("b", "json: not JSON"),
        ("b", "png: not an im"),
        ("b", "txt: not UTF-8"),
    ]
    assert seen == [1, 2]
