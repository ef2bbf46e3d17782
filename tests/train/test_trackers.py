import json
import struct
import sys

import pytest
import wandb
from herdkit.train import RecipeError, TrainerConfig, train
from herdkit.train.config import read_overrides
from herdkit.train.trackers import TrackerError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

BOTH = ["tensorboard", "wandb"]


class KilledError(BaseException):
    pass


def die():
    raise KilledError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def make(toys, path, steps=12, trackers=BOTH, at=10**6, evaluate=None, **trainer):
    return train(
        toys.Toy(),
        toys.ToyLoader(8),
        toys.at_step(at, die),
        run_dir=path,
        evaluate=evaluate or (lambda model, step: {"score": step / 7, "word": "a", "bad": float("inf")}),
        **toys.configs(steps, trainer={"trackers": trackers, "evaluate_every": 4, "log_every": 2, **trainer}),
    )


def logged(run):
    """(step, name, value) of every number in metrics.jsonl."""
    found = set()
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        step = line.pop("step")
        named = {f"evaluation/{name}": value for name, value in line.pop("evaluation", {}).items()}
        found |= {(step, name, value) for name, value in {**line, **named}.items() if isinstance(value, (int, float))}
    return found


def on_tensorboard(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def records(path):
    """Of a .wandb file: a header of 7 bytes, then blocks of 32 KiB with pieces of records (LevelDB's log format)."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        room = 2**15 - at % 2**15
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def on_wandb(run):
    """(step, name, value) as `logged`, and W&B's ids of the run, of all starts."""
    found, ids = [], []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        last = -1
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                ids.append((record.run.run_id, record.run.project, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                assert row["_step"] > last
                last = row["_step"]
                step = row.pop("step")
                found += [(step, name, value) for name, value in row.items() if not name.startswith("_")]
    return found, set(ids)


def assert_same(found, wanted, tolerance=0.0):
    assert [one[:2] for one in sorted(found)] == [one[:2] for one in sorted(wanted)]
    for (_, _, value), (_, _, other) in zip(sorted(found), sorted(wanted), strict=True):
        assert value == pytest.approx(other, rel=tolerance)


def test_both_show_what_is_logged(toys, tmp_path):
    make(toys, tmp_path / "run")
    wanted = logged(tmp_path / "run")
    assert {name for _, name, _ in wanted} >= {"loss", "accuracy", "lr", "tokens", "evaluation/score"}
    assert {step for step, name, _ in wanted if name == "evaluation/score"} == {4, 8, 12}
    assert_same(on_tensorboard(tmp_path / "run"), wanted, 1e-6)  # which keeps numbers in float32
    found, ids = on_wandb(tmp_path / "run")
    assert_same(found, wanted)
    assert {one[1:] for one in ids} == {("herdkit", "run")}


def test_nothing_is_shown_twice_after_an_interruption(toys, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        make(toys, run, at=7)
    before = {one for one in logged(run) if one[0] == 6}
    assert before
    make(toys, run)
    wanted = logged(run)
    assert_same(on_tensorboard(run), wanted, 1e-6)
    found, ids = on_wandb(run)
    assert len(ids) == 1
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    # W&B keeps what it was given first, which differs in speed.
    assert_same(found, {one for one in wanted if one[0] != 6} | before)
    assert {one for one in wanted if one[1] == "loss"} <= set(found)


def test_an_evaluation_that_was_cut_short_is_made_up_for(toys, tmp_path):
    with pytest.raises(KilledError):
        make(toys, tmp_path / "run", evaluate=lambda model, step: die())
    make(toys, tmp_path / "run")
    assert_same(on_tensorboard(tmp_path / "run"), logged(tmp_path / "run"), 1e-6)
    assert_same(on_wandb(tmp_path / "run")[0], logged(tmp_path / "run"))


def test_a_tracker_that_comes_later_gets_what_was_logged_before(toys, tmp_path):
    with pytest.raises(KilledError):
        make(toys, tmp_path / "run", at=7, trackers=[])
    make(toys, tmp_path / "run")
    assert_same(on_tensorboard(tmp_path / "run"), logged(tmp_path / "run"), 1e-6)
    assert_same(on_wandb(tmp_path / "run")[0], logged(tmp_path / "run"))


def test_a_finished_run_starts_none(toys, tmp_path):
    make(toys, tmp_path / "run", steps=2, trackers=[])
    make(toys, tmp_path / "run", steps=2)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_an_error_that_names_the_extra(toys, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrackerError, match=rf"{name} cannot be imported.*pip install 'herdkit\[trackers\]'"):
        make(toys, tmp_path / "run", trackers=[name])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wandb_that_cannot_start_says_what_to_do(toys, tmp_path, monkeypatch):
    def init(**settings):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(TrackerError, match=r"W&B cannot start: No API key configured\. \(WANDB_MODE=offline"):
        make(toys, tmp_path / "run", trackers=["wandb"])
    assert not (tmp_path / "run" / "wandb.json").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [("[tensorbord]", "expected one of"), ("[wandb, wandb]", "different from each other")],
)
def test_names_in_recipes_are_checked(value, message):
    with pytest.raises(RecipeError, match=message):
        read_overrides(TrainerConfig, ["steps=1", "batch_size=1", f"trackers={value}"])
