import itertools
import json
import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
from herdkit.data.bad_samples import LoaderError
from herdkit.data.buckets import BucketConfig, BucketLoader, within_budget
from herdkit.data.loader import Loader
from herdkit.data.mixture import Mixture
from herdkit.data.shards import Sample, ShardReader, ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig, open_loader
from herdkit.train.config import as_dict, load_recipe

BUCKET = BucketConfig(budget=300, window=50)


def source(name, count, seed=0):
    """Samples that hold their own lengths: log-normal, as those of recordings are; some hold several things."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        lengths = [max(1, min(290, round(rng.lognormvariate(3, 0.8)))) for _ in range(1 if i % 7 else 1 + i % 3)]
        while max(lengths) * len(lengths) > 300:
            lengths.pop()
        made.append(Sample(f"{name}{i}", f"{name}.tar", {"json": json.dumps(lengths).encode()}))
    return made


A, B = source("a", 170), source("b", 90, 1)
LENGTHS = {sample.key: sample.json() for sample in [*A, *B]}


def mixture(epochs=2.0):
    return Mixture([("a", A, 2), ("b", B, 1)], epochs={"a": epochs, "b": epochs} if epochs else None)


def lengths_of(sample):
    return sample.json()


def keys(samples):
    return [(position, sample.key) for position, sample in samples]


def loader(bucket=BUCKET, mixed=None, lengths=lengths_of, collate=keys, **options):
    return BucketLoader(mixed or mixture(), collate, bucket, lengths, **{"seed": 5, **options})


def take(one, count=None):
    taken = list(itertools.islice(one, count))
    one.close()
    return taken


def union(ranks):
    """The batches of all ranks as one sequence, without the Nones at its end."""
    together = [batch for step in zip(*ranks, strict=True) for batch in step]
    count = sum(batch is not None for batch in together)
    assert all(batch is None for batch in together[count:])
    return together[:count]


RIGHT = take(loader())


@pytest.mark.parametrize("size", ["padded", "sum"])
@pytest.mark.parametrize("max_samples", [None, 6])
def test_batches_are_within_their_budget_and_hold_everything_once(size, max_samples):
    batches = take(loader(replace(BUCKET, size=size, max_samples=max_samples)))
    order = [mixture().sample(position, 5).key for position in range(520)]
    given = [item for batch in batches for item in batch]
    assert sorted(given) == list(enumerate(order))
    start = 0
    for window in range(0, 520, 50):  # one window after another
        stop = start
        while stop < len(batches) and batches[stop][0][0] < window + 50:
            stop += 1
        positions = [position for batch in batches[start:stop] for position, _ in batch]
        assert sorted(positions) == list(range(window, min(window + 50, 520)))
        start = stop
    for batch in batches:
        inside = [length for _, key in batch for length in LENGTHS[key]]
        assert (sum(inside) if size == "sum" else max(inside) * len(inside)) <= 300
        assert max_samples is None or len(batch) <= max_samples
        assert batch == sorted(batch)


def test_batches_are_full_of_samples_of_like_length_in_an_even_order():
    batches = take(loader(replace(BUCKET, window=500)))
    inside = [[length for _, key in batch for length in LENGTHS[key]] for batch in batches]
    padded = sum(max(lengths) * len(lengths) for lengths in inside)
    assert sum(map(sum, inside)) > 0.85 * padded
    at_random = [[n for sample in [*A, *B][i : i + 9] for n in LENGTHS[sample.key]] for i in range(0, 260, 9)]
    assert sum(map(sum, at_random)) < 0.5 * sum(max(lengths) * len(lengths) for lengths in at_random)
    # Shuffled within the window: not the short ones first. And otherwise with another seed.
    longest = [max(lengths) for lengths in inside]
    assert longest != sorted(longest)
    half = len(longest) // 2
    assert 0.5 < (sum(longest[:half]) / half) / (sum(longest[half:]) / (len(longest) - half)) < 2
    assert [len(batch) for batch in take(loader(replace(BUCKET, window=500), seed=6))] != [len(b) for b in batches]


def test_small_windows_of_few_samples():
    generator = random.Random(0)
    for _ in range(200):
        bucket = BucketConfig(budget=generator.choice([20, 50]), size=generator.choice(["padded", "sum"]))
        lengths = {i: [generator.randint(1, 10)] * generator.randint(1, 2) for i in range(generator.randint(0, 9))}
        batches = within_budget(lengths, bucket)
        assert sorted(position for batch in batches for position in batch) == sorted(lengths)
        sizes = []
        for batch in batches:
            inside = [length for position in batch for length in lengths[position]]
            sizes.append(sum(inside) if bucket.size == "sum" else max(inside) * len(inside))
        assert all(size <= bucket.budget for size in sizes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("options", [{"prefetch": 0}, {"prefetch": 3, "workers": 3}])
def test_ranks_take_turns_in_one_sequence_and_end_together(world_size, options):
    ranks = [loader(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    given = [take(one) for one in ranks]
    assert {len(batches) for batches in given} == {-(-len(RIGHT) // world_size)}
    assert union(given) == RIGHT
    assert {one.consumed for one in ranks} == {520}
    whole = [take(loader(rank=rank, world_size=world_size, drop_last=True)) for rank in range(world_size)]
    assert union(whole) == RIGHT[: len(RIGHT) // world_size * world_size]


def test_stop_and_go_on_with_any_number_of_ranks():
    generator = random.Random(0)
    state, given = None, []
    while len(given) < len(RIGHT):
        world_size = generator.choice([1, 2, 3, 4, 7])
        options = {"prefetch": generator.choice([0, 2, 5]), "workers": generator.choice([1, 3])}
        ranks = [loader(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for one in ranks:
            if state is not None:
                one.load_state_dict(json.loads(state))
        for _ in range(generator.randint(1, 5)):
            given += [batch for batch in (next(one, None) for one in ranks) if batch is not None]
        states = {json.dumps(one.state_dict()) for one in ranks}
        assert len(states) == 1
        state = states.pop()
        assert len(state) < 500
        for one in ranks:
            one.close()
    assert given == RIGHT


def test_an_endless_mixture_goes_on():
    batches = take(loader(mixed=mixture(None)), 200)
    assert batches[: len(RIGHT) - 20] == RIGHT[: len(RIGHT) - 20]
    assert sum(map(len, batches)) > 700


@pytest.mark.parametrize("changes", [{"budget": 299}, {"window": 51}, {"max_samples": 9}, {"size": "sum"}])
def test_a_state_of_other_buckets_is_refused(changes):
    with pytest.raises(LoaderError, match="bucket"):
        loader(replace(BUCKET, **changes)).load_state_dict(loader().state_dict())
    plain = Loader(mixture(), keys, 3, seed=5)
    for state, other in ((plain.state_dict(), loader()), (loader().state_dict(), plain)):
        with pytest.raises(LoaderError, match="bucket"):
            other.load_state_dict(state)


BAD = {"a3": "cannot be measured", "a4": "cannot be collated", "b7": "is too long"}


def measured(sample):
    if sample.key == "a3":
        raise ValueError("cannot be measured")
    return [301] if sample.key == "b7" else sample.json()


def collated(samples):
    if any(sample.key == "a4" for _, sample in samples):
        raise ValueError("cannot be collated")
    return keys(samples)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_bad_samples_are_left_out_and_counted(prefetch):
    skipping = loader(lengths=measured, collate=collated, on_bad="skip", prefetch=prefetch)
    given = [item for batch in take(skipping) for item in batch]
    order = [(position, mixture().sample(position, 5).key) for position in range(520)]
    assert sorted(given) == [(position, key) for position, key in order if key not in BAD]
    found = sorted((bad.position, bad.key) for bad in skipping.bad)
    assert found == [(position, key) for position, key in order if key in BAD]
    reasons = {bad.key: bad.reason for bad in skipping.bad}
    assert reasons == BAD | {"b7": "its size of 301 is above the budget of a batch, 300"}
    assert skipping.consumed == 520
    # Those that cannot be measured are found by every rank, the others by the one that gets them.
    ranks = [loader(lengths=measured, collate=collated, on_bad="skip", rank=r, world_size=3) for r in range(3)]
    for one in ranks:
        take(one)
    assert {bad for one in ranks for bad in one.bad} == set(skipping.bad)
    counts = Counter(bad.key for one in ranks for bad in one.bad)
    assert counts == {"a3": 6, "b7": 6, "a4": 2}


@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_sample_that_cannot_be_measured_stops_the_run_in_its_turn(prefetch):
    failing = loader(lengths=measured, prefetch=prefetch)
    given = []
    for _ in range(2):  # asked again it says the same again
        with pytest.raises(LoaderError, match=r"sample (a3|b7) \(position"):
            given.extend(failing)
    failing.close()
    first = min(position for position in range(520) if mixture().sample(position, 5).key in ("a3", "b7"))
    assert sorted(position for batch in given for position, _ in batch) == list(range(first // 50 * 50))


def test_a_window_without_a_good_sample():
    def none_before(limit):
        def lengths(sample):
            if int(sample.key[1:]) < limit:
                raise ValueError("no")
            return [1]

        return lengths

    alone = Mixture([("a", A, 1)], epochs={"a": 1})
    small = replace(BUCKET, window=4)
    good = take(loader(small, alone, none_before(160), on_bad="skip"))
    assert sum(map(len, good)) == 10
    hopeless = loader(small, alone, none_before(1000), on_bad="skip")
    with pytest.raises(LoaderError, match="100 bad samples in a row"):
        next(hopeless)
    hopeless.close()
    few = Mixture([("a", A[:20], 1)], epochs={"a": 1})
    ended = loader(small, few, none_before(1000), on_bad="skip")
    assert take(ended) == []
    assert len(ended.bad) == 20
    pair = [loader(small, alone, none_before(168), on_bad="skip", rank=rank, world_size=2) for rank in range(2)]
    assert [len(batch) for batch in union([take(one) for one in pair])] == [1, 1]


def test_windows_are_planned_ahead_in_the_background():
    threads = []

    def lengths(sample):
        threads.append(threading.current_thread())
        return sample.json()

    ahead = loader(lengths=lengths)
    next(ahead)
    assert len(threads) == 50
    given = 1
    while ahead.place["window"] == 0:
        next(ahead)
        given += 1
    assert 100 <= len(threads) <= 150
    assert threading.main_thread() not in threads
    ahead.close()


@pytest.fixture
def shards(tmp_path):
    rng = random.Random(0)
    with ShardWriter(tmp_path / "%06d.tar", max_count=40) as writer:
        for i in range(100):
            writer.write(f"a{i}", {"bin": bytes(rng.randrange(1, 2000)), "json": {"n": i}})
    return str(tmp_path / "*.tar")


def test_by_bytes_nothing_is_read_for_the_lengths(shards, monkeypatch):
    reader = ShardReader(shards)
    sizes = [sum(map(len, sample.members.values())) for sample in reader]
    assert [reader.size(i) for i in range(100)] == sizes
    read = []
    monkeypatch.setattr(ShardReader, "__getitem__", lambda self, i: read.append(i) or Sample(str(i), "", {}))
    mixed = Mixture([("a", reader, 1)], epochs={"a": 1})
    bucket = BucketConfig(budget=4000, by="bytes", window=60)
    by_bytes = loader(bucket, mixed, None, prefetch=0)
    for number, batch in enumerate(by_bytes):
        assert len(read) == by_bytes.consumed
        assert len(batch) * max(sizes[int(key)] for _, key in batch) <= 4000
        assert number < 60
    assert sorted(read) == list(range(100))
    with pytest.raises(ValueError, match="source a: list does not know the sizes of its samples"):
        loader(bucket, lengths=None)


def test_by_bytes_what_is_too_large_is_named(shards):
    mixed = Mixture([("a", ShardReader(shards), 1)], epochs={"a": 1})
    skipping = loader(BucketConfig(budget=1500, by="bytes"), mixed, None, on_bad="skip")
    given = take(skipping)
    sizes = {f"a{i}": ShardReader(shards).size(i) for i in range(100)}
    assert {bad.key for bad in skipping.bad} == {key for key, size in sizes.items() if size > 1500} != set()
    assert sum(map(len, given)) + len(skipping.bad) == 100
    assert skipping.bad[0].shard.endswith(".tar")


def test_a_recipe_opens_buckets(shards, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(f"sources: [{{shards: '{shards}', epochs: 1}}]\nbucket: {{budget: 4000, by: bytes}}\n")
    data = load_recipe(path, DataConfig)
    assert as_dict(data)["bucket"] == {
        "budget": 4000.0, "window": 512, "max_samples": None, "size": "padded", "by": "bytes"
    }  # fmt: skip
    assert sum(map(len, open_loader(data, keys, 8))) == 100
    data = load_recipe(path, DataConfig, ["bucket.by=length", "bucket.budget=5"])
    with pytest.raises(ValueError, match=r"measures no lengths of its samples; set data\.bucket\.by to bytes"):
        open_loader(data, keys, 8)
    batches = list(open_loader(data, keys, 8, lengths=lambda sample: [1, 1]))
    assert [len(batch) for batch in batches] == [2] * 50
    with pytest.raises(ValueError, match="budget must be at least 1"):
        load_recipe(path, DataConfig, ["bucket.budget=0"])
    assert DataConfig(sources=[SourceConfig(shards=shards)]).bucket is None
