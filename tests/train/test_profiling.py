import gzip
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from herdkit.cli import main
from herdkit.train import parallel, profile_request, train
from herdkit.train.meters import Meters
from herdkit.train.profile_request import ProfileError, ProfileRequest, ask, take_request
from herdkit.train.profiles import table_path, tables, traces_of
from herdkit.train.run_view import read_run
from herdkit.train.stopwatch import Stopwatch
from herdkit.train.trace_summary import length, merged, summarise
from herdkit.train.trackers import Trackers
from torch.autograd import DeviceType


def make(toys, path, steps=8, objective=None, **trainer):
    model = toys.Toy(0.3)
    train(model, toys.ToyLoader(8), objective or toys.objective, run_dir=path, **toys.configs(steps, trainer=trainer))
    return model


def updates_in(trace):
    """The ranges of updates in a trace, which is read as a whole."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sorted(e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("update "))


def names(run):
    return sorted(path.name for path in (run / "profiles").iterdir())


@pytest.fixture
def unfinished(toys, tmp_path):
    """The directory of a run that seems to be training."""
    make(toys, tmp_path / "run", steps=2)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "starts.jsonl").unlink()
    return tmp_path / "run"


def test_a_profile_of_the_recipe_changes_no_bit(toys, tmp_path):
    plain = make(toys, tmp_path / "plain")
    profiled = make(toys, tmp_path / "run", profile_at=4)
    for found, wanted in zip(profiled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert names(tmp_path / "run") == ["step-00000004-rank-0.json.gz", "step-00000004.txt"]
    assert not (tmp_path / "plain" / "profiles").exists()
    assert updates_in(tmp_path / "run" / "profiles" / "step-00000004-rank-0.json.gz") == [
        "update 5",
        "update 6",
        "update 7",
    ]
    text = (tmp_path / "run" / "profiles" / "step-00000004.txt").read_text()
    assert text.startswith("updates 5 to 7\n")
    assert "Operators of process 0" in text
    assert "aten::" in text
    assert "process 0: 0.000 s of " in text


def test_a_file_asks_a_running_run(toys, tmp_path):
    run = tmp_path / "run"
    make(toys, run, objective=toys.at_step(2, (run / "profile").touch))
    assert names(run) == ["step-00000003-rank-0.json.gz", "step-00000003.txt"]
    assert updates_in(run / "profiles" / "step-00000003-rank-0.json.gz") == ["update 4", "update 5", "update 6"]
    assert not (run / "profile").exists()


def test_a_run_that_is_shorter_than_the_profile_keeps_what_there_is(toys, tmp_path):
    make(toys, tmp_path / "run", profile_at=7)
    assert updates_in(traces_of(tables(tmp_path / "run")[0])[0]) == ["update 8"]


def test_an_error_in_the_middle_leaves_nothing(toys, tmp_path):
    def fail():
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        make(toys, tmp_path / "run", profile_at=3, objective=toys.at_step(4, fail))
    assert not (tmp_path / "run" / "profiles").exists()
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("content", ["{", "[1]", '{"updates": 0}', '{"updates": "all"}', '{"ranks": [3]}', "\xff"])
def test_a_request_that_nobody_understands_is_said_and_dropped(toys, tmp_path, capsys, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "profile").write_bytes(content.encode("latin-1"))
    make(toys, run, steps=2)
    assert not (run / "profile").exists()
    assert not (run / "profiles").exists()
    assert (
        len([line for line in capsys.readouterr().err.splitlines() if "profile" in line or "updates must" in line]) == 1
    )


def test_training_goes_on_where_a_trace_cannot_be_written(toys, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "profiles").write_text("a file")
    make(toys, run, profile_at=1)
    assert read_run(run).state == "finished"
    said = capsys.readouterr().err
    assert "process 0: no trace: " in said


def test_what_a_killed_process_left_is_removed(toys, tmp_path):
    (tmp_path / "run" / "profiles").mkdir(parents=True)
    (tmp_path / "run" / "profiles" / ".step-00000001-rank-0.json.gz").write_text("half")
    make(toys, tmp_path / "run", steps=1)
    assert names(tmp_path / "run") == []


def test_two_processes_agree_and_their_collectives_are_told(finish, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "profile").write_text('{"updates": 2}')
    trainer = {"trackers": ["tensorboard"], "log_every": 1}
    assert finish(2, mode="whole", steps=4, run_dir=str(run), trainer=trainer) == [0, 0]
    assert names(run) == ["step-00000001-rank-0.json.gz", "step-00000001-rank-1.json.gz", "step-00000001.txt"]
    for trace in traces_of(tables(run)[0]):
        assert updates_in(trace) == ["update 2", "update 3"]
    text = tables(run)[0].read_text()
    for words in ("process 0: ", "process 1: ", "gloo:all_reduce", "c10d::allreduce_"):
        assert words in text
    assert "(0.0%)" not in text
    assert len(list((run / "tensorboard").iterdir())) == 1  # the first process alone
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["gradient_sum_time"] < 1 for line in lines if "evaluation" not in line)
    assert main(["watch", "--once", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"{lines[3]['gradient_sum_time']:.1%}" in next(row for row in shown.splitlines() if "gradient sums" in row)
    assert "profiles/step-00000001.txt" in shown
    assert main(["watch", str(run), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<figcaption>gradient_sum_time</figcaption>" in page
    assert "gloo:all_reduce" in page


def test_the_command_asks_and_waits(start, tmp_path, capsys):
    run = tmp_path / "run"
    start(mode="whole", steps=10**6, run_dir=str(run))
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert main(["profile", str(run), "--updates", "2", "--ranks", "0"]) == 0
    said = capsys.readouterr()
    *text, last = said.out.splitlines()
    assert "Operators of process 0" in text
    result = json.loads(last)
    assert len(updates_in(Path(result["traces"][0]))) == 2
    assert Path(result["table"]).read_text().strip() == "\n".join(text).strip()
    assert "waiting for the end of the update at hand" in said.err


def test_runs_that_do_not_run_are_not_waited_for(toys, tmp_path, unfinished, capsys):
    make(toys, tmp_path / "finished", steps=1)
    for path, message in (
        (tmp_path / "finished", "finished; only a run that is training"),
        (tmp_path / "no", "no such"),
    ):
        assert main(["profile", str(path)]) == 1
        assert message in capsys.readouterr().err
    (unfinished / "starts.jsonl").write_text('{"time": 2.0, "event": "end", "reason": "ValueError: no"}\n')
    assert main(["profile", str(unfinished)]) == 1
    assert "ValueError: no; only a run" in capsys.readouterr().err
    assert not (unfinished / "profile").exists()
    assert main(["profile", str(unfinished), "--updates", "0"]) == 1
    assert "updates must be at least 1" in capsys.readouterr().err


def test_a_run_that_ends_meanwhile_is_an_error_and_the_request_is_withdrawn(unfinished, monkeypatch):
    def end(seconds):
        assert json.loads((unfinished / "profile").read_text()) == {"updates": 3, "ranks": None}
        with pytest.raises(ProfileError, match="somebody has asked"):
            ask(unfinished, ProfileRequest())
        (unfinished / "starts.jsonl").write_text('{"time": 2.0, "event": "end", "reason": "told to terminate"}\n')

    monkeypatch.setattr(profile_request.time, "sleep", end)
    with pytest.raises(ProfileError, match="told to terminate; it left no profile"):
        ask(unfinished, ProfileRequest())
    assert not (unfinished / "profile").exists()


def test_a_run_that_is_silent_over_its_profile_is_waited_for(unfinished, monkeypatch):
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 1:
            take_request(unfinished)
        if len(sleeps) == 2:
            for path in [*unfinished.iterdir(), *(unfinished / "checkpoints").iterdir()]:
                os.utime(path, (time.time() - 800,) * 2)
        if len(sleeps) == 4:
            table_path(unfinished, 2).parent.mkdir()
            table_path(unfinished, 2).write_text("")

    monkeypatch.setattr(profile_request.time, "sleep", sleep)
    assert ask(unfinished, ProfileRequest()) == table_path(unfinished, 2)
    assert read_run(unfinished).state == "silent"


def test_communication_is_the_time_in_which_any_collective_was_under_way():
    def event(name, start, end, device=DeviceType.CPU, annotation=False):
        interval = SimpleNamespace(start=start * 1e6, end=end * 1e6)
        return SimpleNamespace(name=name, time_range=interval, device_type=device, is_user_annotation=annotation)

    def summary(*events):
        averages = SimpleNamespace(table=lambda **settings: settings["sort_by"])
        return summarise(SimpleNamespace(events=lambda: events, key_averages=lambda: averages), 20.0)

    host = [
        event("gloo:all_reduce", 0, 4),
        event("gloo:all_reduce", 3, 6),
        event("c10d::allreduce_", 0, 1),
        event("aten::mm", 1, 2),
        event("update 1", 0, 20, annotation=True),
    ]
    found = summary(*host)
    assert (found.communicating, found.exposed) == pytest.approx((6, 5))
    assert [(one.name, one.calls, one.seconds) for one in found.collectives] == [
        ("gloo:all_reduce", 2, pytest.approx(7)),
        ("c10d::allreduce_", 1, pytest.approx(1)),
    ]
    assert found.operators == "self_cpu_time_total"
    device = DeviceType.CUDA
    found = summary(
        *host[3:],
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 2, 8, device),
        event("nccl:all_reduce", 2, 8, device, annotation=True),
        event("ampere_sgemm", 7, 12, device),
        event("nccl:all_reduce", 1, 2),
    )
    assert (found.communicating, found.exposed) == pytest.approx((6, 5))
    assert [one.seconds for one in found.collectives] == pytest.approx([6, 1])
    assert found.operators == "self_device_time_total"


def test_merged_intervals():
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length([(0, 4), (5, 6)]) == 5


def test_gradient_sums_are_a_share_of_the_updates_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "gather", lambda value: [value, {"gradient_sum_time": (0.0, 0.0)}])
    monkeypatch.setattr(parallel, "on_first", lambda function: function())
    meters = Meters(tmp_path, 0, None, None, torch.device("cpu"), Trackers([], tmp_path, 0, {}))
    for _ in range(2):
        meters.effective.begin_update()
        time.sleep(0.06)
        with meters.gradient_sum.measured():
            time.sleep(0.03)
        meters.update(1.0, 1.0, 1, [])
        time.sleep(0.1)  # a checkpoint, for one
    meters.log(2, 0.1, 1.0, 0)
    assert 0.2 < meters.last["gradient_sum_time"] < 0.45


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stopwatch_times_the_device_without_waiting_for_it():
    watch, x = Stopwatch(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    began = time.monotonic()
    with watch.measured():
        for _ in range(20):
            x = x @ x
    asked = time.monotonic() - began
    assert watch.seconds() > asked
    torch.cuda.synchronize()
    assert watch.seconds() == pytest.approx(time.monotonic() - began, rel=0.5)
