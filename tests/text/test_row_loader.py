import json
import random
from itertools import islice, pairwise

import pytest
import torch
from herdkit.data.bad_samples import LoaderError
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
    batches = take(loader(shards, PHASES, window=1), 2 * 12 + 4 * 13)
    shapes = [tuple(batch.tokens.shape) for batch in batches]
    assert shapes == [(4, 64)] * 12 + [(4, 128)] * 12 + [(4, 128)] * 52
    last = torch.cat([batch.tokens.flatten() for batch in batches[2 * 12 + 4 * 11 :]])
    assert len(last[(last != PAD) & (last <= 1000)].unique()) <= 1, "only code is left, and the rest of one document"


def limited(shards, web=1.0, code=1.0):
    data = config(shards)
    for source in data.sources:
        source.epochs = {"web": web, "code": code}[source.name]
    return data


def counted(batches):
    """How many tokens of each document are in the batches."""
    tokens = torch.cat([batch.tokens.flatten() for batch in batches if batch is not None])
    return dict(enumerate(torch.bincount(tokens, minlength=2000).tolist()))


def lengths_of(shards, passes):
    """How many tokens of each document so many passes of the sources have."""
    readers = loader(shards).readers
    encoded = {name: encode(reader[i] for i in range(len(reader))) for name, reader in readers.items()}
    return {tokens[0]: passes[name] * len(tokens) for name, documents in encoded.items() for tokens in documents}


SHRINKING = [
    Phase(from_tokens=2000, row_length=16),
    Phase(from_tokens=2100, row_length=32),  # begins while documents of the first phase are still left
    Phase(from_tokens=2400, row_length=256, weights={"web": 0}),
    Phase(from_tokens=9000, weights={"web": 1, "code": 0}, batch_size=4, accumulate=1),
    Phase(from_tokens=12_000, row_length=48, weights={"code": 1}),
]


@pytest.mark.parametrize("phases", [(), PHASES[:2], SHRINKING])
@pytest.mark.parametrize("window", [1, 100, 3000])
def test_every_document_comes_as_often_as_its_source_may(shards, phases, window):
    data = limited(shards, web=1, code=2)
    of_loader = loader(shards, phases, data=data, window=window)
    batches = list(of_loader)
    of_loader.close()
    wanted = lengths_of(shards, {"web": 1, "code": 2})
    found = counted(batches)
    assert {number: found[number] for number in wanted} == wanted
    assert of_loader.consumed == 1300
    if phases:
        assert {batch.tokens.shape[1] for batch in batches} == {64, *(phase.row_length or 64 for phase in phases)}


def test_phases_that_begin_within_a_window_resume_exactly(shards):
    data = limited(shards)
    first, second = (loader(shards, SHRINKING, data=data, window=300) for _ in range(2))
    straight, states = [], []
    for batch in first:
        straight.append(batch)
        states.append(json.loads(json.dumps(first.state_dict())))
    # Also where a phase begins before the documents of the one before its last are given out.
    assert max(len(state["given"]) for state in states) >= 3
    assert max(len(json.dumps(state)) for state in states) < 700
    changes = [i for i, (a, b) in enumerate(pairwise(states)) if len(a["given"]) != len(b["given"])]
    for at in sorted({*changes, *(i + 1 for i in changes), 5, len(states) - 2}):
        second.load_state_dict(states[at])
        assert second.state_dict() == states[at]
        assert rows(islice(second, 12)) == rows(straight[at + 1 : at + 13])
    first.close()
    second.close()


def test_bad_documents_are_left_out_and_counted_once(shards):
    def fussy(samples):
        if any(sample.key.endswith("7") for sample in samples):
            raise ValueError("sevens are broken")
        return encode(samples)

    data = limited(shards)
    data.on_bad = "skip"
    planned = plan_phases(SHRINKING, TRAINER, data)
    options = {"window": 150, "world_size": 2}
    ranks = [RowLoader(data, planned, fussy, PAD, rank=rank, **options) for rank in range(2)]
    batches = [next(one) for _ in range(30) for one in ranks]
    state = json.loads(json.dumps(ranks[0].state_dict()))
    before = list(ranks[0].bad)
    assert ranks[1].bad == before
    again = RowLoader(data, planned, fussy, PAD, window=150)
    again.load_state_dict(state)
    assert again.bad == []
    assert again.bad_count == len(before) > 10
    batches += list(again)
    assert {(bad.key, "web" in bad.shard) for bad in [*before, *again.bad]} == {
        (f"{i:04d}", web) for web, count in ((True, 700), (False, 300)) for i in range(7, count, 10)
    }
    assert again.bad_count == 100
    wanted = lengths_of(shards, {"web": 1, "code": 1})
    wanted = {number: length for number, length in wanted.items() if number % 10 != 8}  # tokens are numbers plus one
    found = counted(batches)
    assert {number: length for number, length in found.items() if number and length} == wanted
    data.max_bad = 50
    with pytest.raises(LoaderError, match="more than max_bad 50 allows"):
        list(RowLoader(data, planned, fussy, PAD, window=150))


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_processes_end_at_the_same_step(shards, world_size):
    data = limited(shards)
    alone = list(loader(shards, PHASES[:2], data=data))
    shared = [list(loader(shards, PHASES[:2], rank, world_size, data=data)) for rank in range(world_size)]
    assert {len(batches) for batches in shared} == {len(alone)}
    assert rows(part for parts in zip(*shared, strict=True) for part in parts if part is not None) == rows(alone)


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
    with pytest.raises(LoaderError, match="windows of 200, not 100"):
        loader(shards, window=100).load_state_dict(state)


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
