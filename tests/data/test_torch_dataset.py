"""The dataset in plain PyTorch: by itself, in DataLoaders of any number of workers, and stopped and gone on with."""

import itertools
import json
import pickle
import random
from collections import Counter

import pytest
import torch
from herdkit.data import BucketConfig, LoaderError, ShardDataset, ShardError, ShardLoader, ShardWriter, SourceConfig
from herdkit.data.torch_dataset import BLOCKS_KEPT
from PIL import Image
from torch.utils.data import DataLoader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for name, count in (("a", 61), ("b", 20)):
        with ShardWriter(root / name / "%06d.tar", max_count=25) as writer:
            for i in range(count):
                writer.write(f"{name}{i}", {"txt": f"{i + 1000 * (name == 'b')}"})
    return root


def number(sample):
    return int(sample.text("txt"))


def half_bad(sample):
    if number(sample) % 2:
        raise ValueError("is odd")
    return number(sample)


def dataset(shards, batch_size=4, **options):
    return ShardDataset(str(shards / "a" / "*.tar"), batch_size, **{"transform": number, "seed": 2, **options})


def numbers(batches):
    return [batch.tolist() for batch in batches]


def order(shards, turns=1, **options):
    """What a plain iteration gives, turn after turn."""
    one = dataset(shards, **options)
    return [numbers(one) for _ in range(turns)]


def test_iterated_by_itself_it_gives_a_pass_and_then_another_one(shards):
    passes = order(shards, 3)
    for one in passes:
        assert [len(batch) for batch in one] == [4] * 15 + [1]
        assert sorted(itertools.chain(*one)) == list(range(61))
    assert passes[0] != passes[1] != passes[2]
    # Virtual epochs: two iterations of half a pass are one pass.
    halves = order(shards, 2, epochs=0.5)
    assert [sum(map(len, half)) for half in halves] == [30, 31]
    assert list(itertools.chain(*itertools.chain(*halves))) == list(itertools.chain(*passes[0]))
    endless = numbers(itertools.islice(dataset(shards, epochs=None), 31))
    assert list(itertools.chain(*endless))[:122] == list(itertools.chain(*passes[0], *passes[1]))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_plain_dataloader_gives_the_same_order(shards, num_workers):
    loader = DataLoader(dataset(shards), batch_size=None, num_workers=num_workers)
    assert numbers(loader) == order(shards)[0]


@pytest.mark.parametrize(("num_workers", "world_sizes"), [(0, (2, 3)), (2, (3,))])
def test_ranks_share_out_the_order(shards, num_workers, world_sizes):
    for world_size in world_sizes:
        options = {"world_size": world_size, "drop_last": False}
        ranks = [list(ShardLoader(dataset(shards, rank=r, **options), num_workers)) for r in range(world_size)]
        steps = itertools.zip_longest(*ranks, fillvalue=torch.tensor([]))
        together = [n for step in steps for batch in step for n in batch.tolist()]
        assert together == list(itertools.chain(*order(shards)[0]))
        # By default every rank has as many batches, all of them whole.
        whole = [
            list(ShardLoader(dataset(shards, rank=r, world_size=world_size), num_workers)) for r in range(world_size)
        ]
        assert {len(batches) for batches in whole} == {61 // (4 * world_size)}
        assert {len(batch) for batches in whole for batch in batches} == {4}


def test_the_state_is_what_was_taken_whatever_the_workers(shards):
    wanted = list(itertools.chain(*order(shards, 4)))
    generator = random.Random(0)
    taken, state = [], None
    while len(taken) < len(wanted):
        loader = ShardLoader(dataset(shards), generator.choice([0, 0, 1, 2, 3]))
        if state is not None:
            loader.load_state_dict(json.loads(state))
        for batch in itertools.islice(loader, generator.choice([1, 5, 12, 100])):
            taken.append(batch.tolist())
            state = json.dumps(loader.state_dict())
        # After a break the same loader goes on too.
        for batch in itertools.islice(loader, 2):
            taken.append(batch.tolist())
        state = json.dumps(loader.state_dict())
        assert len(state) < 400
    assert taken[: len(wanted)] == wanted


def test_a_state_crosses_to_other_ranks_and_to_the_dataset_itself(shards):
    straight = list(itertools.chain(*order(shards)[0]))
    pair = [ShardLoader(dataset(shards, rank=rank, world_size=2), rank) for rank in range(2)]
    taken = [
        n
        for batches in zip(*(itertools.islice(one, 3) for one in pair), strict=True)
        for b in batches
        for n in b.tolist()
    ]
    states = {json.dumps(one.state_dict()) for one in pair}
    assert len(states) == 1
    alone = dataset(shards, batch_size=5)
    alone.load_state_dict(json.loads(states.pop()))
    taken += [n for batch in alone for n in batch.tolist()]
    assert taken == straight
    with pytest.raises(LoaderError, match="seed"):
        dataset(shards, seed=3).load_state_dict(pair[0].state_dict())
    with pytest.raises(LoaderError, match="sources"):
        dataset(shards, epochs=2).load_state_dict(pair[0].state_dict())


def test_sources_are_mixed_and_keep_their_own_epochs(shards):
    sources = [
        SourceConfig(shards=str(shards / "a" / "*.tar"), weight=2),
        SourceConfig(shards=str(shards / "b" / "*.tar"), epochs=2.5),
    ]
    mixed = ShardDataset(sources, 7, transform=number)
    given = [list(itertools.chain(*numbers(mixed))) for _ in range(2)]
    for turn in given:
        counts = Counter(turn)
        assert all(counts[i] == 1 for i in range(61))
        assert sorted(counts[1000 + i] for i in range(20)) == [2] * 10 + [3] * 10
    both = Counter(given[0] + given[1])
    assert all(both[1000 + i] == 5 for i in range(20))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_known_in_the_main_process(shards, num_workers):
    options = {"transform": half_bad, "on_bad": "skip"}
    loader = ShardLoader(dataset(shards, **options), num_workers)
    given = [n for batch in loader for n in batch.tolist()]
    assert sorted(set(given)) == list(range(0, 61, 2))
    assert {bad.key for bad in loader.dataset.bad} == {f"a{i}" for i in range(1, 61, 2)}
    assert loader.state_dict()["bad"] == len(loader.dataset.bad) >= 30
    limited = ShardLoader(dataset(shards, max_bad=10, **options), num_workers)
    with pytest.raises(LoaderError, match=r"1\d bad samples of"):
        list(limited)
    with pytest.raises(LoaderError, match="is odd"):
        list(ShardLoader(dataset(shards, transform=half_bad), num_workers))


def test_a_plain_dataloader_stops_at_bad_samples_too(shards):
    skipping = dataset(shards, transform=half_bad, on_bad="skip", max_bad=5)
    with pytest.raises(LoaderError, match=r"\d bad samples of"):
        list(DataLoader(skipping, batch_size=None, num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_damaged_in_shards_is_left_out_and_known(tmp_path, num_workers):
    with ShardWriter(tmp_path / "a" / "%d.tar", max_count=10) as writer:
        for i in range(30):
            writer.write(f"a{i}", {"txt": str(i)})
    damaged = tmp_path / "a" / "1.tar"
    content = bytearray(damaged.read_bytes())
    content[3 * 1024 + 140] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ShardError, match=r"1.tar: damaged header at byte 3072, where one can still read a13.txt"):
        dataset(tmp_path)
    loader = ShardLoader(dataset(tmp_path, on_bad="skip", max_bad=1), num_workers)
    assert sorted(n for batch in loader for n in batch.tolist()) == [n for n in range(30) if n != 13]
    [fault] = loader.dataset.faults
    assert (fault.shard, fault.offset, fault.key, fault.member) == (str(damaged), 3072, "a13", "txt")
    with pytest.raises(LoaderError, match=r"1 bad samples of 29 are more than max_bad 0 allows"):
        dataset(tmp_path, on_bad="skip", max_bad=0)


def length(sample):
    return [1 + number(sample) % 9]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_by_length(shards, num_workers):
    options = {"bucket": BucketConfig(budget=30, window=20), "lengths": length}
    loader = ShardLoader(dataset(shards, **options), num_workers)
    batches = numbers(loader)
    assert sorted(itertools.chain(*batches)) == list(range(61))
    assert all(max(1 + n % 9 for n in batch) * len(batch) <= 30 for batch in batches)
    assert batches == numbers(dataset(shards, **options))


def test_samples_come_as_they_are_without_a_transform(shards):
    batch = next(iter(dataset(shards, transform=None)))
    assert isinstance(batch, list)
    assert [one.text("txt") for one in batch] == [one.key[1:] for one in batch]
    joined = dataset(shards, collate=sum)
    assert sum(joined) == sum(range(61))


def test_it_travels_to_a_process_that_shares_no_memory(shards):
    one = dataset(shards)
    taken = numbers(itertools.islice(one, 3))  # it has threads by now
    copy = pickle.loads(pickle.dumps(one))
    assert taken + numbers(copy) == order(shards)[0]
    one.loader.close()


def test_the_layout_is_that_of_the_job(shards, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    one = dataset(shards)
    assert (one.rank, one.world_size, one.drop_last) == (1, 3, True)
    one = dataset(shards, rank=0, world_size=1)
    assert (one.rank, one.world_size, one.drop_last) == (0, 1, False)


def blocks_kept(sample):
    return Image.core.get_blocks_max()


def test_workers_keep_the_memory_of_pictures_and_the_main_process_is_left_alone(shards):
    before = Image.core.get_blocks_max()
    kept = {
        workers: set(itertools.chain(*numbers(ShardLoader(dataset(shards, transform=blocks_kept), workers))))
        for workers in (0, 1)
    }
    assert kept == {0: {before}, 1: {BLOCKS_KEPT}}
    assert before != BLOCKS_KEPT


def test_workers_that_stay_are_refused(shards):
    with pytest.raises(ValueError, match="persistent_workers"):
        ShardLoader(dataset(shards), 2, persistent_workers=True)


def test_accelerate_leaves_the_loader_alone(shards):
    from accelerate import Accelerator

    loader = ShardLoader(dataset(shards), 1)
    assert Accelerator(cpu=True).prepare(loader) is loader
