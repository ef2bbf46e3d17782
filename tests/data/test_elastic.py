"""One order whatever happens: other numbers of ranks and threads at every stop, and processes killed at any moment."""

import gc
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from herdkit.data.buckets import BucketConfig
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig, open_loader
from herdkit.text.row_loader import Phase, RowLoader, plan_phases
from herdkit.train import TrainerConfig

WORLD_SIZES = [1, 2, 3, 4, 7]
TRAINER = TrainerConfig(steps=10_000, batch_size=84, accumulate=1)
PHASES = [
    Phase(from_tokens=12_000, row_length=64),
    Phase(from_tokens=40_000, batch_size=168, accumulate=2, row_length=24, weights={"web": 0}),
    Phase(from_tokens=60_000, weights={"web": 1, "code": 3}),
]
STREAMS = ["mixed", "packed", "bucketed"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    for name, count in (("web", 300), ("code", 140)):
        with ShardWriter(root / name / "%06d.tar", max_count=90) as writer:
            for i in range(count):
                length = max(1, min(200, round(rng.lognormvariate(3.2, 0.9))))
                writer.write(f"{name}{i:04d}", {"txt": f"{i + 1 + 1000 * (name == 'code')} {length}".encode()})
    return root


def encode(samples):
    """A document says its tokens: its number, so many times."""
    numbers = (map(int, sample.text("txt").split()) for sample in samples)
    return [[number] * length for number, length in numbers]


def collate(samples):
    return [sample.key for _, sample in samples]


def length(sample):
    return [int(sample.text("txt").split()[1])]


def config(shards, stream):
    weights = {"web": (2, 7.5), "code": (1, 11)}
    sources = [
        SourceConfig(shards=str(shards / name / "*.tar"), name=name, weight=weight, epochs=epochs)
        for name, (weight, epochs) in weights.items()
    ]
    bucket = BucketConfig(budget=800, window=60) if stream == "bucketed" else None
    return DataConfig(sources=sources, seed=3, row_length=32, bucket=bucket)


def open_stream(shards, stream, rank=0, world_size=1, prefetch=0, workers=1):
    data = config(shards, stream)
    if stream == "packed":
        return RowLoader(
            data, plan_phases(PHASES, TRAINER, data), encode, 0, window=40, rank=rank, world_size=world_size
        )
    loader = open_loader(data, collate, 30, rank, world_size, lengths=length)
    loader.prefetch, loader.workers = prefetch, workers
    return loader


def units(stream, batch):
    """What the order of a stream is made of: keys, rows, or the keys of a batch that go together."""
    if batch is None:
        return []
    if stream == "packed":
        return [
            " ".join(f"{number}x{len(list(run))}" for number, run in itertools.groupby(row))
            for row in batch.tokens.tolist()
        ]
    return batch if stream == "mixed" else [" ".join(batch)]


@pytest.fixture(scope="module")
def straight(shards):
    """Each stream to its end in one go."""
    orders = {}
    for stream in STREAMS:
        loader = open_stream(shards, stream)
        orders[stream] = [unit for batch in loader for unit in units(stream, batch)]
        loader.close()
    assert len(orders["mixed"]) == 7.5 * 300 + 11 * 140
    return orders


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("seed", range(3))
def test_any_ranks_and_threads_at_every_stop(shards, straight, stream, seed):
    generator = random.Random(seed)
    order, state, sizes = [], None, set()
    while len(order) < len(straight[stream]):
        world_size = generator.choice(WORLD_SIZES)
        sizes.add(world_size)
        options = {"prefetch": generator.choice([0, 1, 4]), "workers": generator.choice([1, 3])}
        ranks = [open_stream(shards, stream, rank, world_size, **options) for rank in range(world_size)]
        for one in ranks:
            if state is not None:
                one.load_state_dict(json.loads(state))
        for _ in range(generator.choice([1, 2, 5, 40])):
            order += [unit for one in ranks for unit in units(stream, next(one, None))]
        states = {json.dumps(one.state_dict()) for one in ranks}
        assert len(states) == 1
        state = states.pop()
        assert len(state) < 800
        for one in ranks:
            one.close()
    assert order == straight[stream]
    assert len(sizes) > 2


def consume(shards: Path, folder: Path, seed: int) -> None:
    """Takes one batch of every stream and rank after another, writes down what it was, and then the state with how much
    of what is written down belongs to it, in one file; goes on from there."""
    generator = random.Random(seed)
    world_size = generator.choice([1, 1, 1, 2, 3])
    options = {"prefetch": generator.choice([0, 1, 2]), "workers": generator.choice([1, 2])}
    saved = folder / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"bytes": 0}
    loaders = {}
    for stream in STREAMS:
        loaders[stream] = [open_stream(shards, stream, rank, world_size, **options) for rank in range(world_size)]
        for one in loaders[stream]:
            if stream in state:
                one.load_state_dict(state[stream])
    with (folder / "seen.txt").open("a") as seen:
        seen.truncate(state["bytes"])
        seen.seek(0, os.SEEK_END)
        left = True
        while left:
            left = False
            for stream, ranks in loaders.items():
                for one in ranks:
                    for batch in itertools.islice(one, 1):
                        left = True
                        seen.writelines(f"{stream} {unit}\n" for unit in units(stream, batch))
            seen.flush()
            state = {stream: ranks[0].state_dict() for stream, ranks in loaders.items()}
            (folder / "state.new").write_text(json.dumps({**state, "bytes": seen.tell()}))
            (folder / "state.new").replace(saved)


def test_a_hundred_kills(shards, straight, tmp_path):
    """Forked, so that a kill costs some milliseconds and not the import of torch."""
    generator = random.Random(0)
    seen, saved = tmp_path / "seen.txt", tmp_path / "state.json"
    seen.touch()
    whole = sum(len(f"{stream} {unit}\n") for stream, order in straight.items() for unit in order)
    kills, states, status = 0, set(), None
    while status != 0:
        child = os.fork()
        if child == 0:
            gc.disable()  # it would copy what the parent imported
            try:
                consume(shards, tmp_path, kills)
                os._exit(0)
            finally:
                os._exit(1)
        # At a random moment after it has written so much, since the machine may be slow.
        wanted = seen.stat().st_size + generator.randrange(whole // 250)
        ended, status = 0, 0
        while kills < 100 and not ended and seen.stat().st_size < wanted:
            time.sleep(0.0005)
            ended, status = os.waitpid(child, os.WNOHANG)
        if kills < 100 and not ended:
            time.sleep(generator.uniform(0, 0.003))
            os.kill(child, signal.SIGKILL)
        if not ended:
            _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), "it failed"
        kills += status == signal.SIGKILL
        states.add(saved.read_text() if saved.exists() else "")
    assert kills == 100
    assert len(states) > 50
    found = {stream: [] for stream in STREAMS}
    for line in seen.read_text().splitlines():
        stream, _, unit = line.partition(" ")
        found[stream].append(unit)
    for stream in STREAMS:
        assert found[stream] == straight[stream], stream
