import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from herdkit.train import checkpoint, latest_complete

FAULTY = Path(__file__).with_name("faulty.py")
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@pytest.fixture
def torchrun():
    """Runs `faulty.main` under torchrun on two processes, and returns (exit code, standard error, seconds)."""
    groups = []

    def torchrun(*options, limit=90, **arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        began = time.monotonic()
        started = subprocess.Popen(
            [*command, str(FAULTY), json.dumps(arguments)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **QUIET}, start_new_session=True,
        )  # fmt: skip
        groups.append(started)
        _, told = started.communicate(timeout=limit)
        return started.returncode, told, time.monotonic() - began

    yield torchrun
    for started in groups:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.communicate()


def events(run):
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def assert_same_weights(found, wanted):
    a, b = torch.load(found, weights_only=True), torch.load(wanted, weights_only=True)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_killed_process_costs_a_restart(torchrun, finish, tmp_path):
    straight, run, out = tmp_path / "straight", tmp_path / "run", tmp_path / "out"
    assert finish(2, program=FAULTY, run_dir=str(straight), out=str(straight)) == [0, 0]
    code, told, _ = torchrun("--max-restarts=1", run_dir=str(run), fault="kill", at=6, out=str(out))
    assert code == 0, told
    assert [event["step"] for event in events(run) if event["event"] == "start"] == [0, 4]
    assert "resuming at step 4" in told
    for rank in range(2):
        assert_same_weights(f"{out}.{rank}", f"{straight}.{rank}")


def test_sigterm_ends_all_and_the_next_start_may_have_other_processes(torchrun, finish, tmp_path):
    run = tmp_path / "run"
    code, told, _ = torchrun("--max-restarts=2", run_dir=str(run), fault="terminate", at=5)
    assert code != 0
    assert "told to terminate; saved at step" in told
    assert events(run)[-1]["reason"] == "told to terminate"
    newest = checkpoint.step_of(latest_complete(run))
    assert 6 <= newest < 12
    assert finish(1, program=FAULTY, run_dir=str(run)) == [0]
    assert events(run)[-2]["step"] == newest
    assert json.loads((run / "result.json").read_text())["steps"] == 12


def test_an_error_of_one_process_ends_all_soon_with_its_message(torchrun, tmp_path):
    run = tmp_path / "run"
    code, told, seconds = torchrun(run_dir=str(run), fault="raise", at=6)
    assert code == 1
    cause = told[told.index("Root Cause") :]
    assert "ValueError: the culprit is here" in cause
    assert "rank      : 1 (local_rank: 1)" in cause
    assert seconds < 30
