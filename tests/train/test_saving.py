import errno
import threading

import pytest
import torch
from herdkit.train import TrainerConfig, checkpoint, latest_complete
from herdkit.train.saving import CheckpointWriter


def config(**options):
    return TrainerConfig(steps=100, batch_size=1, **options)


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def stored(path):
    tensors = {"model.a": torch.empty(3, 4), "optimizer.a.step": torch.empty(())}
    checkpoint.load_tensors(path, tensors)
    return tensors


@pytest.fixture
def tensors():
    return {"model.a": torch.randn(3, 4), "optimizer.a.step": torch.tensor(1.0)}


@pytest.fixture
def held(monkeypatch):
    """Background saves begin when this is set."""
    event, save = threading.Event(), checkpoint.save

    def waiting(*arguments):
        assert event.wait(60)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", waiting)
    yield event
    event.set()


def test_a_background_save_holds_what_there_was_when_it_began(tmp_path, tensors, held):
    state, before = {"step": 1, "list": [1]}, {name: tensor.clone() for name, tensor in tensors.items()}
    with CheckpointWriter(tmp_path, config(background_checkpoints=True), None) as writer:
        writer.save(1, tensors, state)
        for tensor in tensors.values():
            tensor.add_(1)
        state["list"].append(2)
        assert writer.last_good is None
        held.set()
    assert writer.last_good == latest_complete(tmp_path)
    assert checkpoint.read_state(writer.last_good) == {"step": 1, "list": [1]}
    assert all(torch.equal(value, before[name]) for name, value in stored(writer.last_good).items())


def test_one_save_waits_for_the_one_before(tmp_path, tensors, held):
    writer = CheckpointWriter(tmp_path, config(background_checkpoints=True), None)
    writer.save(1, tensors, {})
    threading.Timer(0.2, held.set).start()
    tensors["model.a"].zero_()
    writer.save(2, tensors, {})
    assert not held.is_set() or (tmp_path / "checkpoints" / "step-00000001").is_dir()
    writer.wait()
    assert stored(latest_complete(tmp_path))["model.a"].eq(0).all()


@pytest.mark.parametrize("ends", ["the next save", "the end"])
def test_what_goes_wrong_in_the_background_ends_the_run_and_leaves_the_one_before(tmp_path, tensors, monkeypatch, ends):
    writer = CheckpointWriter(tmp_path, config(background_checkpoints=True), None)
    writer.save(1, tensors, {})
    writer.wait()

    monkeypatch.setattr(checkpoint, "sync", full)
    writer.save(2, tensors, {})
    with pytest.raises(OSError, match="No space left"):
        writer.save(3, tensors, {}) if ends == "the next save" else writer.__exit__(None, None, None)
    assert latest_complete(tmp_path) == writer.last_good
    assert checkpoint.step_of(writer.last_good) == 1


def test_an_error_of_training_is_told_with_the_loss_of_the_checkpoint(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(checkpoint, "sync", full)

    def run():
        with CheckpointWriter(tmp_path, config(background_checkpoints=True), None) as writer:
            writer.save(1, tensors, {})
            raise ValueError("training")

    with pytest.raises(ValueError, match="training") as error:
        run()
    assert "lost as well" in error.value.__notes__[0]
    assert "No space left" in error.value.__notes__[0]
    assert latest_complete(tmp_path) is None


def test_some_checkpoints_stay_for_good(tmp_path, tensors):
    writer = CheckpointWriter(tmp_path, config(keep=2, keep_every=3), None)
    for step in range(1, 9):
        writer.save(step, tensors, {})
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [8, 7, 6, 3]
