import itertools
import json
import logging
import multiprocessing
import random
import threading
import time
from collections import Counter

import pytest
import torch
from herdkit.data.bad_samples import LoaderError
from herdkit.data.dialogs import dialog_sample
from herdkit.data.loader import Loader
from herdkit.data.media import MediaError
from herdkit.data.mixture import Mixture
from herdkit.data.shards import Sample, ShardReader, ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig, open_loader, source_names


def source(name, length):
    return [Sample(f"{name}{index}", f"{name}.tar", {}) for index in range(length)]


def mixed(**lengths):
    return Mixture([(name, source(name, length), i + 1) for i, (name, length) in enumerate(lengths.items())])


def keys(samples):
    return [(position, sample.key) for position, sample in samples]


def loader(mixture=None, collate=keys, batch_size=3, **options):
    return Loader(mixture or mixed(a=17, b=40), collate, batch_size, **{"seed": 7, **options})


def take(loader, count):
    with_end = list(itertools.islice(loader, count))
    loader.close()
    return with_end


def flat(batches):
    return [item for batch in batches for item in batch]


RIGHT = [(p, s.key) for p in range(600) for s in [mixed(a=17, b=40).sample(p, 7)]]


def test_order_is_that_of_the_mixture():
    assert flat(take(loader(), 50)) == RIGHT[:150]
    assert flat(take(loader(seed=8), 50)) != RIGHT[:150]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_out_the_same_order(world_size):
    ranks = [take(loader(rank=rank, world_size=world_size), 10) for rank in range(world_size)]
    together = [item for step in zip(*ranks, strict=True) for batch in step for item in batch]
    assert together == RIGHT[: 30 * world_size]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 7])
@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_and_workers_change_nothing(prefetch, workers):
    def slow(samples):
        time.sleep(random.random() / 500)
        return keys(samples)

    assert flat(take(loader(collate=slow, prefetch=prefetch, workers=workers), 30)) == RIGHT[:90]


def test_stop_and_go_on_with_any_number_of_ranks():
    """Runs of several lengths, each on other ranks, batch sizes and workers; the state crosses as JSON."""
    generator = random.Random(0)
    state, order = None, []
    for _ in range(12):
        world_size, batch_size = generator.choice([1, 2, 4]), generator.choice([1, 2, 5])
        options = {
            "world_size": world_size,
            "prefetch": generator.choice([0, 2, 5]),
            "workers": generator.choice([1, 2]),
        }
        ranks = [loader(batch_size=batch_size, rank=rank, **options) for rank in range(world_size)]
        for one in ranks:
            if state is not None:
                one.load_state_dict(json.loads(state))
        for _ in range(generator.randint(1, 6)):
            order += flat(next(one) for one in ranks)
        states = {json.dumps(one.state_dict()) for one in ranks}
        assert len(states) == 1
        state = states.pop()
        for one in ranks:
            one.close()
    assert order == RIGHT[: len(order)]
    assert len(order) > 100
    assert len(state) < 500


def test_prefetched_batches_are_not_consumed():
    first = loader(prefetch=5)
    seen = flat(itertools.islice(first, 4))
    time.sleep(0.05)
    assert first.state_dict()["consumed"] == 12
    second = loader(prefetch=5)
    second.load_state_dict(first.state_dict())
    assert seen + flat(itertools.islice(second, 4)) == RIGHT[:24]
    first.load_state_dict({**first.state_dict(), "consumed": 3})
    assert next(first) == RIGHT[3:6]
    first.close()
    assert next(first) == RIGHT[6:9]
    first.close()
    second.close()


def limited(end_of_a=17, end_of_b=23):
    parts = [("a", source("a", 17), 1), ("b", source("b", 40), 2)]
    return Mixture(parts, epochs={"a": end_of_a / 17, "b": end_of_b / 40})


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_limited_sources_end_for_all_ranks_at_the_same_step(world_size, batch_size, prefetch):
    options = {"batch_size": batch_size, "world_size": world_size, "prefetch": prefetch, "workers": 2}
    order = [(position, limited().sample(position, 7).key) for position in range(40)]
    ranks = [loader(limited(), rank=rank, **options) for rank in range(world_size)]
    given = [take(one, 1000) for one in ranks]
    assert {len(batches) for batches in given} == {-(-40 // (batch_size * world_size))}
    steps = list(zip(*given, strict=True))
    assert [item for step in steps for batch in step for item in batch or []] == order
    last = [len(batch or []) for batch in steps[-1]]
    assert max(last) - min(last) <= 1
    assert all(len(batch) == batch_size for step in steps[:-1] for batch in step)
    assert len({json.dumps(one.state_dict()) for one in ranks}) == 1
    assert ranks[0].consumed == 40
    for one in ranks:
        with pytest.raises(StopIteration):
            next(one)
        one.close()
    whole = [take(loader(limited(), rank=rank, drop_last=True, **options), 1000) for rank in range(world_size)]
    count = 40 // (batch_size * world_size)
    assert [[len(batch) for batch in batches] for batches in whole] == [[batch_size] * count] * world_size


def test_a_state_of_other_limits_is_refused():
    state = loader(limited()).state_dict()
    with pytest.raises(LoaderError, match="sources"):
        loader(limited(end_of_a=16)).load_state_dict(state)


def endless_run(folder):
    """Writes down each batch and then the state, until it is killed."""
    mixture = Mixture([(name, ShardReader(folder / name), weight) for name, weight in [("a", 2), ("b", 1)]])
    one = Loader(mixture, lambda samples: [sample.key for _, sample in samples], 2, seed=3, workers=2)
    state = folder / "state.json"
    if state.exists():
        one.load_state_dict(json.loads(state.read_text()))
    with (folder / "seen.txt").open("a") as seen:
        for batch in one:
            seen.write(f"{one.consumed} {' '.join(batch)}\n")
            seen.flush()
            (folder / "state.new").write_text(json.dumps(one.state_dict()))
            (folder / "state.new").replace(state)
            time.sleep(0.002)


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    for name, count in [("a", 30), ("b", 11)]:
        with ShardWriter(tmp_path / name / "%03d.tar", max_count=8) as writer:
            for i in range(count):
                writer.write(f"{name}{i}", {"txt": "x"})
    seen = tmp_path / "seen.txt"
    seen.touch()
    for target in [15, 40, 60]:
        process = multiprocessing.get_context("fork").Process(target=endless_run, args=(tmp_path,))
        process.start()
        try:
            while len(seen.read_text().splitlines()) < target:
                assert process.is_alive()
                time.sleep(0.002)
        finally:
            process.kill()
            process.join()
    mixture = Mixture([(name, ShardReader(tmp_path / name), weight) for name, weight in [("a", 2), ("b", 1)]])
    lines = [line.split() for line in seen.read_text().splitlines()]
    for consumed, *batch in lines:
        start = int(consumed) - 2
        assert batch == [mixture.sample(position, 3).key for position in range(start, start + 2)]
    # Killed between the batch and its state, a run sees one batch twice; it never passes one over.
    ends = [int(line[0]) for line in lines]
    assert ends[0] == 2
    assert all(after - before in (2, 0) for before, after in itertools.pairwise(ends))
    assert sum(after == before for before, after in itertools.pairwise(ends)) <= 2


def test_a_state_of_other_data_is_refused():
    state = loader().state_dict()
    with pytest.raises(LoaderError, match="seed 7, but the loader has 8"):
        loader(seed=8).load_state_dict(state)
    with pytest.raises(LoaderError, match="sources"):
        loader(mixed(a=17, b=41)).load_state_dict(state)


def fussy(samples):
    for _, sample in samples:
        if sample.key in ("a3", "a4", "b7"):
            raise MediaError(sample.key, "is broken")
    return keys(samples)


def test_bad_samples_are_named():
    failing = loader(collate=fussy)
    seen = []
    with pytest.raises(LoaderError, match=r"^[ab].tar: sample (a3|a4|b7) \(position \d+\): (a3|a4|b7): is broken$"):
        seen.extend(failing)
    consumed = failing.consumed
    assert flat(seen) == RIGHT[:consumed]
    assert {key for _, key in RIGHT[consumed : consumed + 3]} & {"a3", "a4", "b7"}
    # Once more the same batch: nothing is passed over.
    with pytest.raises(LoaderError, match="is broken"):
        next(failing)
    assert failing.consumed == consumed
    failing.close()


BAD = {"a3", "a4", "b7"}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_bad_samples_are_left_out_and_counted(prefetch, caplog):
    skipping = loader(collate=fussy, prefetch=prefetch, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        got = flat(take(skipping, 80))
    assert got == [(position, key) for position, key in RIGHT[:240] if key not in BAD]
    found = [(position, key) for position, key in RIGHT[:240] if key in BAD]
    assert [(entry.position, entry.key) for entry in skipping.bad] == found
    assert [(entry.shard, entry.reason) for entry in skipping.bad] == [
        (f"{k[0]}.tar", f"{k}: is broken") for _, k in found
    ]
    assert len(caplog.records) == len(found) == skipping.bad_count == skipping.state_dict()["bad"]
    assert f"left out {skipping.bad[0]}" in caplog.text
    # The count goes on in the next run, and the list is this run's.
    following = loader(collate=fussy, prefetch=prefetch, on_bad="skip")
    following.load_state_dict(skipping.state_dict())
    assert flat(take(following, 40)) == [(position, key) for position, key in RIGHT[240:360] if key not in BAD]
    later = sum(key in BAD for _, key in RIGHT[240:360])
    assert (len(following.bad), following.bad_count) == (later, len(found) + later)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_good_sample_stands_in_where_nothing_is_left(batch_size):
    world_size = 3
    ranks = [
        loader(collate=fussy, batch_size=batch_size, rank=rank, world_size=world_size, on_bad="skip")
        for rank in range(world_size)
    ]
    given = [take(one, 60 // batch_size) for one in ranks]
    for rank, batches in enumerate(given):
        for step, batch in enumerate(batches):
            start = (step * world_size + rank) * batch_size
            right = RIGHT[start : start + batch_size]
            good = [item for item in right if item[1] not in BAD]
            if good:
                assert batch == good
            else:  # from the same source, and one that comes in its own place too
                ((position, key),) = batch
                assert position == right[0][0]
                assert key[0] == right[0][1][0]
                assert key not in BAD
    stood_in = [bad for one in ranks for bad in one.bad]
    assert {(bad.position, bad.key) for bad in stood_in} >= {item for item in RIGHT[:180] if item[1] in BAD}


def budget(max_bad, **options):
    skipping = loader(collate=fussy, batch_size=5, on_bad="skip", max_bad=max_bad, **options)
    try:
        list(itertools.islice(skipping, 1800))
    except LoaderError as error:
        return skipping, str(error)
    finally:
        skipping.close()
    return skipping, "never"


def test_a_budget_of_bad_samples():
    skipping, message = budget(6)
    assert skipping.bad_count == 6
    places = [position for position, key in RIGHT if key in BAD]
    assert skipping.consumed == places[6] // 5 * 5
    lines = message.splitlines()
    assert lines[0] == f"7 bad samples of {skipping.consumed + 5} are more than max_bad 6 allows; the last:"
    assert [int(line.rpartition("(position ")[2].partition(")")[0]) for line in lines[1:]] == places[2:7]
    # About 3 of 51 are bad; the share is taken of a thousand at least.
    skipping, message = budget(0.02)
    assert message.startswith("21 bad samples of ")
    assert skipping.consumed < 500
    skipping, message = budget(0.09)
    assert message == "never"
    # Before and elsewhere count too.
    again = loader(collate=fussy, batch_size=5, on_bad="skip", max_bad=6)
    again.load_state_dict({**again.state_dict(), "bad": 4})
    again.bad_elsewhere += 2
    with pytest.raises(LoaderError, match="7 bad samples"):
        list(again)
    again.close()


def test_skipping_gives_up_when_nothing_is_good():
    def never(samples):
        raise ValueError("no")

    hopeless = loader(collate=never, on_bad="skip")
    with pytest.raises(LoaderError, match="100 bad samples in a row"):
        next(hopeless)
    hopeless.close()


def test_a_batch_of_good_samples_that_fails_is_no_bad_sample():
    def only_alone(samples):
        if len(samples) > 1:
            raise ValueError("cannot be stacked")
        return samples

    for on_bad in ["raise", "skip"]:
        odd = loader(collate=only_alone, on_bad=on_bad)
        with pytest.raises(ValueError, match="cannot be stacked") as caught:
            next(odd)
        assert not isinstance(caught.value, LoaderError)
        odd.close()


def test_other_exceptions_surface_as_they_are():
    def broken(samples):
        return {}["missing"]

    for prefetch in [0, 2]:
        failing = loader(collate=broken, prefetch=prefetch, on_bad="skip")
        with pytest.raises(KeyError, match="missing"):
            next(failing)
        failing.close()


def test_bad_shards_and_dialogs_are_bad_samples(tmp_path):
    with ShardWriter(tmp_path / "%d.tar") as writer:
        for i in range(6):
            role = "robot" if i == 2 else "user"
            writer.write(str(i), {"json": {"messages": [{"role": role, "content": "x"}]}})
    mixture = Mixture([("s", ShardReader(tmp_path), 1)])

    def dialogs(samples):
        return [(sample.key, dialog_sample(sample)) for _, sample in samples]

    skipping = Loader(mixture, dialogs, 6, seed=0, on_bad="skip")
    assert sorted(key for key, _ in next(skipping)) == ["0", "1", "3", "4", "5"]
    (bad,) = skipping.bad
    assert (bad.shard, bad.key, bad.member) == (str(tmp_path / "0.tar"), "2", "json")
    assert bad.reason.startswith("messages[0].role must be one of")
    assert str(bad).startswith(f"{tmp_path / '0.tar'}: sample 2.json (position {bad.position}): messages[0].role")
    skipping.close()
    (tmp_path / "0.tar").write_bytes(b"something else")
    failing = Loader(mixture, dialogs, 2, seed=0)
    with pytest.raises(LoaderError, match=r"0.tar: .*changed since it was indexed"):
        next(failing)
    failing.close()


def test_batches_are_prepared_ahead_but_not_too_far():
    started = []
    gate = threading.Event()

    def count(samples):
        started.append(samples[0][0])
        gate.wait(5)
        return samples

    ahead = loader(collate=count, prefetch=2, workers=8)
    gate.set()
    next(ahead)
    deadline = time.time() + 5
    while len(started) < 3 and time.time() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(started) == [0, 3, 6]
    ahead.close()


def test_workers_leave_torch_threads_alone():
    before = torch.get_num_threads()
    inside = []
    torch.set_num_threads(2)
    after = []

    def consume():  # in a thread that has not used torch yet
        take(loader(collate=lambda samples: inside.append(torch.get_num_threads())), 3)
        after.append(torch.get_num_threads())

    thread = threading.Thread(target=consume)
    thread.start()
    thread.join()
    after.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert set(inside) == {1}
    assert after == [2, 2]


def test_no_threads_are_left():
    before = threading.active_count()
    take(loader(workers=3), 5)
    assert threading.active_count() == before
    idle = loader(prefetch=0)
    next(idle)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be within 0 .. 1, not 2"),
        ({"prefetch": -1}, "prefetch"),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"on_bad": "ignore"}, "on_bad must be 'raise' or 'skip', not 'ignore'"),
        ({"max_bad": 3}, "max_bad must be at least 0, and on_bad 'skip', not 3 and 'raise'"),
        ({"max_bad": -0.1, "on_bad": "skip"}, "max_bad must be at least 0"),
    ],
)
def test_arguments(options, error):
    with pytest.raises(ValueError, match=error):
        loader(**options)


def test_the_order_does_not_depend_on_where_the_data_lie(tmp_path):
    def order(folder):
        for name in ("cats", "dogs"):
            with ShardWriter(tmp_path / folder / name / "%06d.tar", max_count=100) as writer:
                for i in range(40):
                    writer.write(f"{name}{i:02d}", {"txt": str(i)})
        sources = [SourceConfig(shards=str(tmp_path / folder / name / "*.tar")) for name in ("cats", "dogs")]
        loader = open_loader(DataConfig(sources=sources, seed=3), lambda samples: [s.key for _, s in samples], 20)
        return next(iter(loader))

    assert order("here") == order("there") != sorted(order("elsewhere"))
    same = [SourceConfig(shards=f"{folder}/cats/*.tar") for folder in ("a", "b")]
    assert source_names(same) == ["a/cats/*.tar", "b/cats/*.tar"]
    assert source_names([*same, SourceConfig(shards="c/cats/*.tar", name="mine")])[2] == "mine"


def test_a_recipe_says_how_often_a_source_comes(tmp_path):
    for name, count in [("a", 10), ("b", 4)]:
        with ShardWriter(tmp_path / name / "%06d.tar", max_count=100) as writer:
            for i in range(count):
                writer.write(f"{name}{i}", {"txt": str(i)})
    sources = [
        SourceConfig(shards=str(tmp_path / "a" / "*.tar"), epochs=1.5, weight=2),
        SourceConfig(shards=str(tmp_path / "b" / "*.tar"), epochs=2),
    ]
    given = flat(open_loader(DataConfig(sources=sources), keys, 5))
    counts = Counter(key for _, key in given)
    assert sum(counts.values()) == 23
    assert sorted(counts[f"a{i}"] for i in range(10)) == [1] * 5 + [2] * 5
    assert all(counts[f"b{i}"] == 2 for i in range(4))


def test_a_recipe_says_what_happens_to_bad_samples(tmp_path):
    with ShardWriter(tmp_path / "%06d.tar", max_count=100) as writer:
        for i in range(10):
            writer.write(f"a{i}", {"txt": str(i)})

    def batch(on_bad, max_bad=None):
        data = DataConfig(sources=[SourceConfig(shards=str(tmp_path / "*.tar"))], on_bad=on_bad, max_bad=max_bad)
        return next(iter(open_loader(data, fussy, 10)))

    with pytest.raises(LoaderError, match="is broken"):
        batch("raise")
    assert {key for _, key in batch("skip", 2)} == {f"a{i}" for i in range(10)} - {"a3", "a4"}
    with pytest.raises(LoaderError, match="2 bad samples of 10 are more than max_bad 1"):
        batch("skip", 1)
