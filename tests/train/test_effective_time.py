import json
import signal
from types import SimpleNamespace

import pytest
import torch
from herdkit.train import NonFiniteError, checkpoint, effective_time, meters, train, trainer
from herdkit.train.files import read_lines
from herdkit.train.peak_flops import peak_flops

FIRST = 1_000_000.0


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    clock = SimpleNamespace(now=FIRST)
    clock.time = clock.monotonic = lambda: clock.now
    for module in (effective_time, meters):
        monkeypatch.setattr(module, "time", clock)
    save = checkpoint.save

    def slow_save(*args):
        clock.now += 5
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    return clock


@pytest.fixture
def go(toys, tmp_path, clock):
    """Trains, or resumes, a toy whose updates take 10 s, checkpoints 5 s and evaluations 3 s; one that is interrupted
    is so in update `at` of this start, counted from 0."""

    def go(at=10**6, steps=12, poison=(), **trainer):
        calls = 0

        def objective(model, batch):
            nonlocal calls
            if calls == at:
                raise KeyboardInterrupt
            clock.now += 10
            loss, count, metrics = toys.objective(model, batch)
            calls += 1
            return loss * torch.nan if calls - 1 in poison else loss, count, metrics

        def evaluate(model, step):
            clock.now += 3
            return {"zero": 0.0}

        return train(
            toys.Toy(), toys.ToyLoader(8), objective, run_dir=tmp_path / "run", evaluate=evaluate,
            **toys.configs(steps, trainer=trainer, schedule={"kind": "constant"}),
        )  # fmt: skip

    return go


def test_checkpoints_evaluations_and_the_first_update_are_not_useful(go, tmp_path):
    result = go()
    # Checkpoints at steps 4, 8 and 12, an evaluation at the end.
    assert result["elapsed_seconds"] == 12 * 10 + 3 * 5 + 3
    assert result["effective_time"] == pytest.approx(11 * 10 / 138)
    first, *_, last = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert (first["step"], first["effective_time"]) == (3, pytest.approx(20 / 30))
    assert last["effective_time"] == pytest.approx(110 / 130)


def test_lost_updates_and_idle_time_count_as_elapsed_alone(go, clock, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(at=7)  # steps 5 to 7 are lost
    clock.now += 1000
    result = go()
    assert result["effective_time"] == pytest.approx((3 + 7) * 10 / (70 + 5 + 1000 + 80 + 10 + 3))
    first, end, second, finish = read_lines(tmp_path / "run" / "starts.jsonl")
    assert (first["event"], first["step"], first["time"]) == ("start", 0, FIRST)
    assert (end["event"], end["reason"]) == ("end", "KeyboardInterrupt")
    assert (second["step"], second["reached"], second["time"]) == (4, 6, FIRST + 1075)
    assert finish["reason"] == "finished"
    assert {row["part"]: row["trainable"] > 0 for row in first["parts"]} == {
        "text": True,
        "image": True,
        "unused": True,
    }


def test_a_start_that_died_before_its_first_checkpoint_counts(go, clock):
    with pytest.raises(KeyboardInterrupt):
        go(at=2)
    result = go()
    assert result["elapsed_seconds"] == 20 + 138
    assert result["effective_time"] == pytest.approx(110 / 158)


def test_updates_left_out_are_not_useful(go):
    result = go(poison=(4, 5), non_finite="skip")
    assert result["effective_time"] == pytest.approx(9 * 10 / 138)


def test_rest_between_a_finish_and_a_longer_run_is_not_elapsed(go, clock):
    go(steps=4)
    clock.now += 10_000
    again = go(steps=4)
    assert again["elapsed_seconds"] == 48
    assert go(steps=8)["elapsed_seconds"] == 2 * 48


def test_the_reason_of_an_end_is_recorded(go, tmp_path):
    with pytest.raises(NonFiniteError):
        go(poison=(2,))
    assert "step 3: the loss is nan" in read_lines(tmp_path / "run" / "starts.jsonl")[-1]["reason"]


def test_it_survives_a_kill(finish, tmp_path):
    run = tmp_path / "run"
    assert finish(mode="kill", run_dir=str(run), number=6) == [-signal.SIGKILL]
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"time": 17')  # as a machine that died may leave it
    assert finish(mode="terminate", run_dir=str(run), number=2) == [128 + signal.SIGTERM]
    assert finish(mode="whole", run_dir=str(run)) == [0]
    events = read_lines(run / "starts.jsonl")
    assert [line["event"] for line in events] == ["start", "start", "end", "start", "end"]
    assert [line["reason"] for line in events if line["event"] == "end"] == ["told to terminate", "finished"]
    assert [line["step"] for line in events if line["event"] == "start"] == [0, 4, 7]
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["effective_time"] < 0.5  # three processes began for twelve updates of milliseconds
    assert result["elapsed_seconds"] > events[-1]["time"] - events[0]["time"]


def test_utilisation_needs_both_flops_and_a_peak(toys, tmp_path, clock, monkeypatch):
    def objective(model, batch):
        clock.now += 10
        return toys.objective(model, batch)

    def last(name, **kwargs):
        return train(
            toys.Toy(), toys.ToyLoader(8), objective, run_dir=tmp_path / name, **toys.configs(6), **kwargs
        )["last"]  # fmt: skip

    def flops(step):
        return 1e12 * (1 + step)

    assert "mfu" not in last("unknown", flops=flops)
    monkeypatch.setattr(trainer, "peak_flops", lambda name, precision: 1e12)
    assert "mfu" not in last("uncounted")
    # The last line is of updates 3 to 5, with 4, 5 and 6 TFLOPs in 10 s each.
    assert last("known", flops=flops)["mfu"] == pytest.approx(15 / 30)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 9999", None),
        ("x86_64", None),
    ],
)
def test_peaks_are_those_of_the_very_device(name, peak):
    assert peak_flops(name, "bfloat16") == peak
    assert peak_flops(name, "float32") is None
