import json

import pytest
import torch
from herdkit.train import checkpoint, fraction, latest_complete, parallel

IMAGES = [4, 5, 6, 7, 9, 10]  # first update: the second process alone; second: the first alone; third: nobody


def saved(out, processes):
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(processes)]


def assert_close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def plain_torch(toys, dtype, steps):
    """Weights, and gradients of every update, of plain torch on whole batches; matrices before vectors."""
    model = toys.Toy().to(dtype)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = iter(toys.ToyLoader(8, dtype=dtype, images=IMAGES))
    updates = []
    for step in range(steps):
        loss, count, _ = toys.objective(model, next(batches))
        (loss / count).backward()
        updates.append([None if p.grad is None else p.grad.clone() for p in matrices + vectors])
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * fraction(toys.configs()["schedule"], step, steps)
        adamw.step()
        adamw.zero_grad()
    return model, updates


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-12)])
def test_two_processes_are_plain_torch_on_the_whole_batch(toys, finish, tmp_path, dtype, tolerance):
    out = tmp_path / "out"
    arguments = {"mode": "gradients", "steps": 3, "dropout": 0.0, "dtype": dtype, "images": IMAGES}
    assert finish(2, run_dir=str(tmp_path / "run"), out=str(out), **arguments) == [0, 0]
    first, second = saved(out, 2)
    model, updates = plain_torch(toys, getattr(torch, dtype), 3)
    for step, (expected, *found) in enumerate(zip(updates, first["updates"], second["updates"], strict=True)):
        for wanted, mine, theirs in zip(expected, *found, strict=True):
            if wanted is None:
                assert mine is None
                assert theirs is None
            else:
                assert torch.equal(mine, theirs)
                # Later gradients also carry what rounding did to the weights before.
                assert_close(mine, wanted, tolerance if step == 0 else 30 * tolerance)
    assert sum(g is None for g in updates[2]) == sum(g is None for g in updates[1]) + 4
    for name, wanted in model.named_parameters():
        assert torch.equal(first["model"][name], second["model"][name])
        assert_close(first["model"][name], wanted.detach(), 100 * tolerance)
    assert first["result"] == second["result"]


def test_the_log_of_two_processes_is_that_of_one(finish, tmp_path):
    arguments = {"mode": "whole", "steps": 4, "dropout": 0.0, "dtype": "float64", "images": IMAGES}
    assert finish(2, run_dir=str(tmp_path / "two"), **arguments) == [0, 0]
    assert finish(1, run_dir=str(tmp_path / "one"), **arguments) == [0]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    for a, b in zip(one[:2], two[:2], strict=True):
        for key in ("step", "loss", "accuracy", "lr", "grad_norm", "tokens", "samples"):
            assert a[key] == pytest.approx(b[key], rel=1e-9), key
    assert one[0]["images"] == 3  # mean over the micro-batches that have any: 4 and 2 images
    assert two[0]["images"] == 3
    assert two[2]["evaluation"].keys() == {"random"}


def test_a_process_without_a_sample_takes_part_in_the_last_update(toys, finish, tmp_path):
    arguments = {"mode": "gradients", "steps": 3, "dropout": 0.0, "dtype": "float64", "end": 17}
    assert toys.ToyLoader(4, rank=0, world_size=2, end=17).__iter__().__next__() is not None
    assert list(toys.ToyLoader(4, rank=0, world_size=2, end=17))[-1] is None
    for processes in (1, 2):
        run_dir, out = str(tmp_path / f"run{processes}"), str(tmp_path / f"out{processes}")
        assert finish(processes, run_dir=run_dir, out=out, **arguments) == [0] * processes
    (alone,), shared = saved(tmp_path / "out1", 1), saved(tmp_path / "out2", 2)
    for name, wanted in alone["model"].items():
        for one in shared:
            if name != "text.seen":
                assert_close(one["model"][name], wanted, 1e-9)
    assert shared[0]["result"]["tokens"] == shared[1]["result"]["tokens"] == alone["result"]["tokens"]


def test_two_processes_resume_bitwise(finish, tmp_path):
    for name, number in (("straight", None), ("run", 6)):
        mode = "whole" if number is None else "kill"
        codes = finish(2, mode=mode, number=number or 0, run_dir=str(tmp_path / name))
        assert codes == ([0, 0] if number is None else [-9, -9])
    assert latest_complete(tmp_path / "run").name == "step-00000004"
    for name in ("straight", "run"):
        assert finish(2, mode="whole", run_dir=str(tmp_path / name), out=str(tmp_path / name)) == [0, 0]
    for a, b in zip(saved(tmp_path / "straight", 2), saved(tmp_path / "run", 2), strict=True):
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"] if "image.0" not in name)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_processes(finish, tmp_path, before, after):
    arguments = {"dropout": 0.0, "dtype": "float64", "images": IMAGES, "run_dir": str(tmp_path / "run")}
    straight = {**arguments, "run_dir": str(tmp_path / "straight")}
    assert finish(1, mode="whole", out=str(tmp_path / "straight-out"), **straight) == [0]
    assert finish(before, mode="kill", number=6, **arguments) == [-9] * before
    assert finish(after, mode="whole", out=str(tmp_path / "out"), **arguments) == [0] * after
    wanted, found = saved(tmp_path / "straight-out", 1)[0], saved(tmp_path / "out", after)[0]
    for name, value in wanted["model"].items():
        if name != "text.seen":  # counts forward passes of this process
            assert_close(found["model"][name], value, 1e-9)
    assert found["result"]["tokens"] == wanted["result"]["tokens"]
    states = [checkpoint.read_state(latest_complete(tmp_path / name)) for name in ("run", "straight")]
    assert states[0]["loader"] == states[1]["loader"]


def test_one_process_told_to_terminate_ends_all_at_the_same_update(finish, tmp_path):
    codes = finish(2, mode="terminate-first", number=5, run_dir=str(tmp_path / "run"))
    assert codes == [128 + 15] * 2
    assert latest_complete(tmp_path / "run").name == "step-00000006"


def test_an_error_on_the_first_process_is_raised_on_all(toys, finish, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert finish(2, mode="whole", run_dir=str(tmp_path / "run")) == [toys.RUN_DIRECTORY_ERROR] * 2


def test_a_batch_size_that_does_not_divide(finish, tmp_path):
    assert finish(3, mode="whole", run_dir=str(tmp_path / "run")) == [1, 1, 1]


def test_processes_that_never_joined_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"2 processes were started, but not joined.*process_group\(\)"):
        parallel.require_process_group()


def test_gradients_of_many_buckets_and_types_are_summed(monkeypatch):
    # On one process nothing is summed; the buckets themselves keep order, dtype and size.
    monkeypatch.setattr(parallel, "BUCKET_ELEMENTS", 5)
    gradients = [torch.zeros(n, dtype=t) for n, t in [(3, torch.float32), (2, torch.float32), (9, torch.float32)]]
    gradients += [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float32)]
    buckets = list(parallel._buckets(gradients))
    assert [[g.numel() for g in bucket] for bucket in buckets] == [[3, 2], [9], [2], [1]]
