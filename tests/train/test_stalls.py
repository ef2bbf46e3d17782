import json
import re
import time
from pathlib import Path

from herdkit.train.stragglers import Stragglers
from herdkit.train.watchdog import LONG, STALLED, Watchdog

FAULTY = Path(__file__).with_name("faulty.py")


def reports(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("rank-*.txt"))


def wait_for(condition, limit=10.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def test_a_stalled_process_ends_all_with_stacks_and_a_code_of_its_own(finish, tmp_path):
    run, told = tmp_path / "run", tmp_path / "errors"
    trainer = {"stall_seconds": 1.5, "stall_action": "exit"}
    codes = finish(
        2, limit=60, program=FAULTY, run_dir=str(run), fault="stall", at=6, seconds=120, trainer=trainer,
        errors=str(told),
    )  # fmt: skip
    assert codes == [STALLED, STALLED]
    (start,) = (run / "stalls").iterdir()
    assert reports(start) == ["step-00000007/rank-0.txt", "step-00000007/rank-1.txt"]
    waiting, sleeping = ((start / "step-00000007" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "sum_all" in waiting
    assert "all_reduce" in waiting
    assert re.search(r'faulty\.py", line \d+ in <lambda>', sleeping)
    for rank, place in ((0, "sum of gradients"), (1, "micro-batch 1 of 1")):
        line = Path(f"{told}.{rank}").read_text()
        assert f"train: rank {rank} of 2: " in line
        assert f"(step 7, {place}); stacks in {start / 'step-00000007' / f'rank-{rank}.txt'}" in line
    records = [start / "step-00000007" / f"collectives_rank_{rank}.json" for rank in (0, 1)]
    called = [json.loads(record.read_text())["entries"] for record in records]
    assert len(called[0]) == len(called[1]) + 1  # the sum of gradients
    assert called[0][-1]["profiling_name"] == "gloo:all_reduce"
    assert not called[0][-1]["retired"]


def test_a_stall_that_ends_is_reported_and_the_run_goes_on(finish, tmp_path):
    run = tmp_path / "run"
    trainer = {"stall_seconds": 1.0}
    codes = finish(
        2, limit=60, program=FAULTY, run_dir=str(run), fault="stall", at=6, seconds=2.5, trainer=trainer
    )  # fmt: skip
    assert codes == [0, 0]
    assert reports(run / "stalls")


def test_what_takes_long_once_has_longer(tmp_path):
    limit = 0.1
    with Watchdog(tmp_path, limit) as watchdog:
        watchdog.note(0, "waiting for data")
        time.sleep(3 * limit)
        watchdog.note(1, "checkpoint", long=True)
        time.sleep(3 * limit)
        watchdog.note(1, "waiting for data")
        watchdog.note(2, "waiting for data")
        assert not reports(tmp_path)
        watchdog.note(2, "evaluation", long=True)
        time.sleep(LONG * limit / 2)
        assert not reports(tmp_path)
        wait_for(lambda: reports(tmp_path))
    assert "step 3, evaluation" in next(tmp_path.rglob("rank-0.txt")).read_text()


def test_places_within_an_update_do_not_start_the_clock_anew(tmp_path):
    with Watchdog(tmp_path, 0.2) as watchdog:
        watchdog.note(0, "waiting for data")
        watchdog.note(1, "waiting for data")
        began = time.monotonic()
        while not reports(tmp_path) and time.monotonic() < began + 10:
            watchdog.note(1, "micro-batch 1 of 2")
            watchdog.note(1, "waiting for data")
            time.sleep(0.01)
    assert time.monotonic() < began + 5
    assert reports(tmp_path)


def test_a_process_answers_the_call_of_another(tmp_path, capsys):
    with Watchdog(tmp_path, 20.0, description="stage") as watchdog:  # it looks every second
        watchdog.note(4, "waiting for data")
        (watchdog.folder / "step-00000005").mkdir(parents=True)
        wait_for(lambda: reports(tmp_path))
    assert "stage: rank 0 of 1: another process has stalled (step 5, waiting for data)" in capsys.readouterr().err


def test_no_limit_no_thread(tmp_path):
    with Watchdog(tmp_path, None) as watchdog:
        assert not watchdog._thread.is_alive()


def test_the_slow_process_is_found(finish, tmp_path):
    run, told = tmp_path / "run", tmp_path / "errors"
    arguments = {"program": FAULTY, "run_dir": str(run), "errors": str(told), "trainer": {"straggler_factor": 2.0}}
    assert finish(2, fault="slow", seconds=0.1, limit=60, **arguments) == [0, 0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(line["slowest_rank"] == 1 for line in lines)
    assert all(line["slowest_over_median"] > 2 for line in lines)
    said = re.findall(
        r"rank 1 on \S+ is slow: \S+ times the median for (\d) lines of the log", Path(f"{told}.0").read_text()
    )
    assert said == ["3"]


def test_one_slow_line_is_not_said(monkeypatch):
    said = []
    stragglers = Stragglers(1.5, said.append)
    monkeypatch.setattr("herdkit.train.parallel.world_size", lambda: 4)
    ratios = []
    for slow in (2, 2, None, 2, 1, 1, 1, 1):
        seconds = [3.0 if rank == slow else 1.0 for rank in range(4)]
        monkeypatch.setattr("herdkit.train.parallel.gather", lambda _, s=seconds: [(x, "node7") for x in s])
        ratios.append(stragglers.report()["slowest_over_median"])
    assert ratios == [3, 3, 1, 3, 3, 3, 3, 3]
    assert said == ["rank 1 on node7 is slow: 3.0 times the median for 3 lines of the log"]


def test_one_process_has_no_straggler():
    assert Stragglers(1.5, print).report() == {}
