import json

import pytest
import torch
from herdkit.train import LossSpikeError, SpikePolicy, TrainerConfig, checkpoint, latest_complete, train
from herdkit.train.guard import Guard
from herdkit.train.spikes import Spikes


def made(**policy):
    """Spikes that have seen losses about 2 and norms about 1."""
    spikes = Spikes(SpikePolicy(action="skip", window=8, least=4, **policy))
    for i in range(6):
        assert spikes.reason(2 + 0.01 * (i % 3), 1 + 0.1 * (i % 3)) is None
    return spikes


def test_what_stands_out():
    assert made().reason(2.2, 1.1) is None
    assert made().reason(0.1, 0.1) is None
    assert made().reason(2.3, 1.1) == "the loss is 2.3, after a median of 2.01 ± 0.02"
    assert made().reason(2.0, 3.0).startswith("the gradient norm is 3, after a median of 1.1")
    assert made(threshold=100.0).reason(2.3, 1.1) is None


def test_what_stood_out_is_not_remembered_and_the_window_moves():
    spikes = made()
    before = list(spikes.recent)
    assert spikes.reason(9.0, 1.0)
    assert list(spikes.recent) == before
    for _ in range(8):
        assert spikes.reason(2.1, 1.0) is None
    assert list(spikes.recent) == [(2.1, 1.0)] * 8


def test_nothing_is_judged_at_first_and_nothing_by_default():
    spikes = Spikes(SpikePolicy(action="skip", least=4))
    assert all(spikes.reason(loss, 1.0) is None for loss in (1.0, 100.0, 1.0, 1000.0))
    guard = Guard("stop")
    assert all(guard.objection(step, loss, 1.0, loss, {}) is None for step, loss in enumerate([1.0] * 64 + [1e9]))
    assert guard.state_dict() == {"skipped": 0, "empty": 0}


def test_a_new_level_is_no_spike(tmp_path):
    guard = Guard("stop", SpikePolicy(action="skip", least=4, patience=3))
    guard.last_good = tmp_path
    for step in range(4):
        assert guard.objection(step, 20.0, 10, 1.0, {}) is None
    assert "update skipped (1 so far)" in guard.objection(4, 90.0, 10, 1.0, {})
    assert guard.objection(5, 20.0, 10, 1.0, {}) is None
    for step in (6, 7):
        assert guard.objection(step, 90.0, 10, 1.0, {})
    again = Guard("stop", SpikePolicy(action="skip", least=4, patience=3), json.loads(json.dumps(guard.state_dict())))
    again.last_good = tmp_path
    with pytest.raises(LossSpikeError, match=rf"step 9: .* {tmp_path}; 3 updates in a row .* from step 7 on"):
        again.objection(8, 90.0, 10, 1.0, {})


def test_a_policy_that_makes_no_sense():
    with pytest.raises(ValueError, match="least must be from 1 to window"):
        SpikePolicy(window=4, least=5)
    with pytest.raises(ValueError, match="stall_seconds must be above 0"):
        TrainerConfig(steps=1, batch_size=1, stall_seconds=0)


@pytest.fixture
def go(toys, tmp_path):
    """Trains, or resumes, a toy; the loss of one update of twelve is a hundred times too large."""

    def go(name, action="skip", at=None, stop_at=None, offset=0):
        calls = offset

        def objective(model, batch):
            nonlocal calls
            if calls == stop_at:
                raise KeyboardInterrupt
            loss, count, metrics = toys.objective(model, batch)
            calls += 1
            return (loss * 100 if calls - 1 == at else loss), count, metrics

        policy = SpikePolicy(action=action, least=3, window=6, threshold=20.0)
        settings = toys.configs(trainer={"spikes": policy})
        return train(toys.Toy(0.3), toys.ToyLoader(8), objective, run_dir=tmp_path / name, **settings)

    return go


def state(path):
    newest = latest_complete(path)
    stored = checkpoint.describe_tensors(newest)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    checkpoint.load_tensors(newest, tensors)
    return tensors, checkpoint.read_state(newest)["guard"]


# The run that is cut off goes on from step 4, whose window has 4 updates, and must find the same spike.
def test_skipping_is_the_same_after_a_resume(go, tmp_path):
    assert go("straight", at=7)["skipped_steps"] == 1
    with pytest.raises(KeyboardInterrupt):
        go("cut", at=7, stop_at=6)
    assert go("cut", at=7, offset=4)["skipped_steps"] == 1
    (wanted, wanted_guard), (found, found_guard) = state(tmp_path / "straight"), state(tmp_path / "cut")
    assert found_guard == wanted_guard
    assert len(found_guard["recent"]) == 6
    assert all(wanted[name].equal(found[name]) for name in wanted)


def test_stopping_names_the_checkpoint_and_skipping_goes_on_from_it(go, tmp_path):
    with pytest.raises(LossSpikeError, match=r"step 8: the loss is .*step-00000004; .*trainer\.spikes\.action to skip"):
        go("run", action="stop", at=7)
    assert go("run", at=7, offset=4)["skipped_steps"] == 1
    go("straight", at=7)
    (wanted, _), (found, _) = state(tmp_path / "straight"), state(tmp_path / "run")
    assert all(wanted[name].equal(found[name]) for name in wanted)
