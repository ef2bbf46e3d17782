import random

import pytest
import torch
from herdkit.data.loader import LoaderError
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig
from herdkit.text.row_loader import Phase, RowLoader, plan_phases, with_ramp
from herdkit.train import TrainerConfig

PAD = 0


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of numbered documents of realistic lengths: log-normal, a few much longer than a row."""
    root = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    for name, count in (("web", 700), ("code", 300)):
        with ShardWriter(root / name / "%06d.tar") as writer:
            for i in range(count):
                length = max(1, round(rng.lognormvariate(3.2, 1.0)))
                writer.write(f"{i:04d}", {"txt": f"{name} {i} {length}".encode()})
    return root


def encode(samples):
    """A document says its own length; its tokens are its number, so that a row tells which documents it has."""
    rows = []
    for sample in samples:
        name, number, length = sample.text("txt").split()
        rows.append([1 + int(number) + (1000 if name == "code" else 0)] * int(length))
    return rows


def config(shards, **changes):
    sources = [SourceConfig(shards=str(shards / name / "*.tar"), weight=w, name=name) for name, w in WEIGHTS.items()]
    return DataConfig(**({"sources": sources, "row_length": 64, "seed": 3} | changes))


WEIGHTS = {"web": 2, "code": 1}
TRAINER = TrainerConfig(steps=100, batch_size=8, accumulate=2)
PHASES = [
    Phase(from_tokens=3000, row_length=128),
    Phase(from_tokens=9000, batch_size=16, accumulate=4, weights={"code": 3}),
    Phase(from_tokens=30_000, weights={"web": 0}),
]


def loader(shards, phases=(), rank=0, world_size=1, data=None, **options):
    data = data or config(shards)
    planned = plan_phases(phases, TRAINER, data)
    return RowLoader(data, planned, encode, PAD, **{"window": 200, "rank": rank, "world_size": world_size} | options)


def rows(batches):
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def take(rows_of, count):
    batches = [next(rows_of) for _ in range(count)]
    rows_of.close()
    return batches


def test_phases_begin_with_the_update_that_reaches_their_tokens(shards):
    planned = plan_phases(PHASES, TRAINER, config(shards))
    # 6 updates of 8 x 64 are 3,072 tokens, 6 of 8 x 128 make 9,216, 11 of 16 x 128 make 31,744.
    assert [phase.from_step for phase in planned] == [0, 6, 12, 23]
    assert [phase.weights for phase in planned[1:]] == [WEIGHTS, {"web": 2, "code": 3}, {"web": 0, "code": 3}]
    trainer = with_ramp(TRAINER, planned)
    assert [trainer.batch_at(step) for step in (0, 11, 12, 99)] == [(8, 2), (8, 2), (16, 4), (16, 4)]


def test_batches_are_what_the_phases_say(shards):
    batches = take(loader(shards, PHASES), 2 * 12 + 4 * 13)
    shapes = [tuple(batch.tokens.shape) for batch in batches]
    assert shapes == [(4, 64)] * 12 + [(4, 128)] * 12 + [(4, 128)] * 52
    last = torch.cat([batch.tokens for batch in batches[2 * 12 + 4 * 11 :]])
    assert (last[last != PAD] > 1000).all(), "only code is left"


def test_every_document_comes_once_before_any_comes_twice(shards):
    data = config(shards, sources=[SourceConfig(shards=str(shards / "web" / "*.tar"), name="web")])
    of_loader = loader(shards, data=data, window=100)
    lengths = dict.fromkeys(range(1, 701), 0)
    while of_loader._windows.consumed <= 700 or of_loader._given < len(of_loader._rows):
        for row in next(of_loader).tokens.tolist():
            for token in row:
                if token != PAD:
                    lengths[token] += 1
    of_loader.close()
    wanted = {sample[0]: len(sample) for sample in encode(of_loader.readers["web"][i] for i in range(700))}
    again = {number for number, length in lengths.items() if length == 2 * wanted[number]}
    assert all(lengths[number] in (wanted[number], 2 * wanted[number]) for number in wanted)
    assert 90 < len(again) <= 300, "of the windows that were read ahead"


def test_rows_are_nearly_full(shards):
    batches = take(loader(shards, data=config(shards, row_length=256), window=512), 40)
    assert torch.cat([batch.tokens for batch in batches]).ne(PAD).double().mean() > 0.95


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_one_order(shards, world_size):
    alone = take(loader(shards, PHASES), 40)
    shared = [take(loader(shards, PHASES, rank, world_size), 40) for rank in range(world_size)]
    for micro in range(40):
        assert shared[0][micro].tokens.shape[0] == 4 // world_size
    # An update's rows are the same set, and with one process in the same order.
    for start, size in ((0, 2), (2, 2), (24, 4), (28, 4)):
        wanted = rows(alone[start : start + size])
        found = [row for micro in range(start, start + size) for part in shared for row in rows([part[micro]])]
        assert found == wanted


@pytest.mark.parametrize("at", [1, 7, 12, 13, 24, 27, 69])
def test_resume_is_exact(shards, at):
    straight = take(loader(shards, PHASES), 80)
    first = loader(shards, PHASES)
    for _ in range(at):
        next(first)
    state = first.state_dict()
    first.close()
    second = loader(shards, PHASES)
    next(second)  # wherever it stood before
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert rows(take(second, 80 - at)) == rows(straight[at:])


def test_a_state_of_other_sources_is_refused(shards):
    state = loader(shards).state_dict()
    other = loader(shards, data=config(shards, seed=4))
    with pytest.raises(LoaderError, match="seed"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase(from_tokens=0, row_length=128)], r"phases\[0\].from_tokens 0 must be above 0"),
        ([Phase(from_tokens=3000), Phase(from_tokens=2000)], r"phases\[1\].from_tokens 2000 must be above 3,072"),
        ([Phase(from_tokens=9, weights={"wbe": 1})], "no source is named 'wbe'; there are web, code"),
        ([Phase(from_tokens=9, weights={"web": 0, "code": 0})], r"phases\[0\].weights leave no source"),
    ],
)
def test_impossible_phases_are_named(shards, phases, message):
    with pytest.raises(ValueError, match=message):
        plan_phases(phases, TRAINER, config(shards))


def test_batches_that_do_not_divide_are_refused(shards):
    with pytest.raises(ValueError, match="batch_size 8 must be a multiple of accumulate x processes = 2 x 3"):
        loader(shards, world_size=3)
