import json
import shutil
import signal

import pytest
import torch
from herdkit.train import (
    CheckpointError,
    FreezeRule,
    RunDirectoryError,
    checkpoint,
    latest_complete,
    load_weights,
    train,
)

FREEZE = [FreezeRule(pattern="image.0.*", trainable=False)]


@pytest.fixture
def go(toys, tmp_path):
    """Trains, or resumes, a toy with dropout in tmp_path / name; fresh weights but for the frozen ones."""

    def go(name="run", objective=None, model=None, freeze=FREEZE, loader=None, evaluate=None, **config):
        fresh = toys.Toy(0.3)
        model = model or fresh
        loader = loader or toys.ToyLoader(8)
        result = train(
            model, loader, objective or toys.objective, run_dir=tmp_path / name, freeze=freeze,
            evaluate=evaluate, **toys.configs(**config),
        )  # fmt: skip
        return model, result

    return go


def other(toys):
    """A toy whose weights, but for the frozen ones, are not those that the run began with."""
    model = toys.Toy(0.3, seed=9)
    model.image[0].load_state_dict(toys.Toy().image[0].state_dict())
    return model


def losses(path):
    """What the log says of training, but for times and memory."""
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timed = ("wall_seconds", "tokens_per_second", "effective_time", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in logged]


def tensors(path):
    stored = checkpoint.describe_tensors(path)
    values = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    checkpoint.load_tensors(path, values)
    return values


def assert_same_run(found, wanted):
    """Two finished runs are the same to the last bit: weights, moments, generators, log."""
    a, b = latest_complete(found), latest_complete(wanted)
    assert a.name == b.name
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    one, two = checkpoint.read_state(a), checkpoint.read_state(b)
    for key in ("random", "loader", "step", "guard"):
        assert one[key] == two[key], key
    assert losses(found) == losses(wanted)


class StopError(Exception):
    pass


def stop():
    raise StopError


@pytest.mark.parametrize("at", [2, 4, 7, 11])
def test_resume_is_bitwise(toys, go, tmp_path, at):
    straight, _ = go("straight")
    with pytest.raises(StopError):
        go(objective=toys.at_step(at, stop))
    resumed, _ = go(model=other(toys) if at >= 4 else None)
    for (name, found), wanted in zip(resumed.state_dict().items(), straight.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_two_resumes_in_a_row(toys, go, tmp_path):
    go("straight")
    for at in (5, 3):
        with pytest.raises(StopError):
            go(objective=toys.at_step(at, stop))
    go()
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_longer_run_goes_on_from_a_finished_one(toys, go, tmp_path):
    constant = {"schedule": {"kind": "constant"}}
    go("straight", steps=12, **constant)
    go(steps=6, **constant)
    _, result = go(steps=12, **constant)
    assert result["steps"] == 12
    a, b = tensors(latest_complete(tmp_path / "run")), tensors(latest_complete(tmp_path / "straight"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    with pytest.raises(RunDirectoryError, match=r"is at step 12 already, past trainer\.steps 6"):
        go(steps=6, **constant)


def test_a_finished_run_returns_its_result_and_weights(toys, go):
    model, result = go()

    def never(model, batch):
        raise AssertionError

    again, second = go(objective=never, model=other(toys))
    assert second == result
    for found, wanted in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)


def test_wall_seconds_add_up(toys, go, tmp_path):
    with pytest.raises(StopError):
        go(objective=toys.at_step(9, stop))
    path = latest_complete(tmp_path / "run")
    before = checkpoint.read_state(path)["meters"]["wall_seconds"]
    state = json.loads((path / "state.json").read_text())
    state["meters"]["wall_seconds"] = before + 1000
    (path / "state.json").write_text(json.dumps(state))
    rewrite_manifest(path)
    _, result = go()
    assert result["wall_seconds"] > 1000


def rewrite_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = checkpoint._describe(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    """The run that processes of `toys.main` make when nobody kills them."""
    path = tmp_path_factory.mktemp("straight") / "run"
    toys.main("whole", str(path))
    return path


def test_killed_in_the_middle(straight, finish, tmp_path):
    assert finish(mode="kill", run_dir=str(tmp_path / "run"), number=6) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "result.json").exists()
    assert finish(mode="whole", run_dir=str(tmp_path / "run")) == [0]
    assert_same_run(tmp_path / "run", straight)


# The first six calls of sync make the save of step 4: three files, their folder, all of it, the name; the file
# system may hold any part of a save at its death, and the seventh call is in the save of step 8.
@pytest.mark.parametrize(
    ("mode", "number", "survives"),
    [
        ("kill-in-save", 0, 0),
        ("kill-in-save", 4, 0),
        ("kill-in-save", 5, 4),
        ("kill-in-save", 6, 4),
        ("kill-in-delete", 0, 12),
    ],
)
def test_killed_in_a_save(straight, finish, tmp_path, mode, number, survives):
    run = tmp_path / "run"
    assert finish(mode=mode, run_dir=str(run), number=number) == [-signal.SIGKILL]
    newest = latest_complete(run)
    assert (checkpoint.step_of(newest) if newest else 0) == survives
    assert finish(mode="whole", run_dir=str(run)) == [0]
    assert_same_run(run, straight)
    assert not list((run / "checkpoints").glob(".*"))
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["step-00000008", "step-00000012"]


def test_sigterm_saves_and_ends(straight, finish, tmp_path):
    assert finish(mode="terminate", run_dir=str(tmp_path / "run"), number=5) == [128 + signal.SIGTERM]
    assert latest_complete(tmp_path / "run").name == "step-00000006"
    assert finish(mode="whole", run_dir=str(tmp_path / "run")) == [0]
    assert_same_run(tmp_path / "run", straight)


def test_an_evaluation_that_was_cut_off_is_made_up_for(toys, go, tmp_path):
    def evaluate(model, step):
        if interrupted:
            raise StopError
        return {"step": step}

    interrupted = True
    config = {"trainer": {"evaluate_every": 4}}
    with pytest.raises(StopError):
        go(evaluate=evaluate, **config)
    interrupted = False
    _, result = go(evaluate=evaluate, **config)
    assert result["evaluation"] == {"step": 12}
    found = [line["evaluation"] for line in losses(tmp_path / "run") if "evaluation" in line]
    assert found == [{"step": 4}, {"step": 8}, {"step": 12}]


def test_a_line_cut_short_in_the_log_is_dropped(toys, go, tmp_path):
    go("straight")
    with pytest.raises(StopError):
        go(objective=toys.at_step(9, stop))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    go()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


DAMAGES = {
    "truncated": lambda path: (path / "tensors" / "__0_0.distcp").write_bytes(b"x"),
    "flipped": lambda path: flip(path / "tensors" / "__0_0.distcp"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"files": {"st'),
    "no state": lambda path: (path / "state.json").unlink(),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_never_used(toys, go, tmp_path, capsys, damage):
    go("straight")
    with pytest.raises(StopError):
        go(objective=toys.at_step(9, stop), trainer={"keep": 1} if damage == "truncated" else {})
    bad = latest_complete(tmp_path / "run")
    assert bad.name == "step-00000008"
    DAMAGES[damage](bad)
    capsys.readouterr()
    if damage == "truncated":  # with keep 1 the good one is gone, and the damaged one does not count as kept
        go(trainer={"keep": 1})
    else:
        go()
        assert_same_run(tmp_path / "run", tmp_path / "straight")
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000008 ignored: " in said
    assert checkpoint.find_damage(latest_complete(tmp_path / "run")) is None


def test_keeping_one_never_deletes_the_only_good_one_for_a_damaged_one(toys, go, tmp_path):
    with pytest.raises(StopError):
        go(objective=toys.at_step(9, stop))
    DAMAGES["flipped"](tmp_path / "run" / "checkpoints" / "step-00000008")
    with pytest.raises(StopError):  # goes on from step 4 and saves step 6 beside the damaged step 8
        go(objective=toys.at_step(3, stop), trainer={"checkpoint_every": 3, "keep": 1})
    assert latest_complete(tmp_path / "run").name == "step-00000006"


def test_another_recipe_in_the_same_directory_is_an_error(toys, go, tmp_path):
    with pytest.raises(StopError):
        go(objective=toys.at_step(5, stop))
    with pytest.raises(RunDirectoryError) as caught:
        go(optimizer={"lr": 3e-3}, trainer={"batch_size": 4})
    message = str(caught.value)
    assert "optimizer.lr: 0.01 -> 0.003" in message
    assert "trainer.batch_size: 8 -> 4" in message
    assert "Choose another run directory" in message
    with pytest.raises(RunDirectoryError, match="freeze"):
        go(freeze=[])
    go(trainer={"log_every": 1, "checkpoint_every": 5, "keep": 1})
    with pytest.raises(RunDirectoryError, match=r"optimizer\.lr"):  # finished runs too
        go(optimizer={"lr": 3e-3})


def test_a_recipe_may_change_before_the_first_checkpoint(toys, go, tmp_path):
    with pytest.raises(StopError):
        go(objective=toys.at_step(2, stop))
    go(optimizer={"lr": 3e-3})
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["optimizer"]["lr"] == 3e-3


def test_a_model_that_does_not_fit_is_named(toys, go):
    with pytest.raises(StopError):
        go(objective=toys.at_step(5, stop))
    wider = toys.Toy(0.3)
    wider.image[3] = torch.nn.Linear(16, 16, bias=False)
    wider.text.output = torch.nn.Linear(16, 12)
    with pytest.raises(CheckpointError, match=r"model\.image\.3\.bias would not be trained"):
        go(model=wider)
    shaped = toys.Toy(0.3)
    shaped.text.output = torch.nn.Linear(16, 12)
    with pytest.raises(CheckpointError) as caught:
        go(model=shaped)
    assert "model.text.output.weight is (11, 16) float32 in it and (12, 16) float32 in the model" in str(caught.value)
    assert "model.text.output.bias" in str(caught.value)
    larger = toys.Toy(0.3)
    larger.more = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"model\.more\.bias is not in it"):
        go(model=larger)


def test_other_frozen_weights_are_noticed(toys, go):
    with pytest.raises(StopError):
        go(objective=toys.at_step(5, stop))
    with pytest.raises(CheckpointError, match=r"other frozen parameters: image\.0\.weight, image\.0\.bias differ"):
        go(model=toys.Toy(0.3, seed=9))


def test_frozen_parameters_are_not_stored(go, tmp_path):
    go()
    names = checkpoint.describe_tensors(latest_complete(tmp_path / "run"))
    assert not any("image.0" in name for name in names)
    assert "buffer.text.seen" in names
    assert not any("scale" in name for name in names)


def test_load_weights(toys, go, tmp_path):
    model, _ = go()
    path = latest_complete(tmp_path / "run")
    loaded = other(toys)
    load_weights(loaded, path)
    for found, wanted in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(CheckpointError, match="the model has no"):
        load_weights(torch.nn.Linear(2, 2), path)
    flip(path / "tensors" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(loaded, path)


def test_a_run_directory_that_is_a_file(go, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        go()


def test_a_moved_run_directory_resumes(toys, go, tmp_path):
    go("straight")
    with pytest.raises(StopError):
        go(objective=toys.at_step(9, stop))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    go("moved")
    assert_same_run(tmp_path / "moved", tmp_path / "straight")
