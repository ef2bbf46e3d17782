import json
import math

import pytest
import torch
from herdkit.train import (
    BatchChange,
    FreezeRule,
    GroupRule,
    LoaderExhaustedError,
    NonFiniteError,
    RunDirectoryError,
    fraction,
    latest_complete,
    move,
    precision,
    train,
    trainer,
)
from herdkit.train.optimizer import build_optimizer
from torch.nn import functional as F


@pytest.fixture
def run(toys, tmp_path):
    """Trains a fresh toy; returns (model, result, gradients of every update)."""

    def run(model=None, name="run", objective=None, loader=None, dtype=torch.float32, **kwargs):
        model = model or toys.Toy().to(dtype)
        sections = ("steps", "trainer", "optimizer", "schedule")
        settings = toys.configs(**{key: kwargs.pop(key) for key in sections if key in kwargs})
        images = kwargs.pop("images", range(10**6))
        size = settings["trainer"].micro_batch_size(1)
        loader = loader or toys.ToyLoader(size, dtype=dtype, images=images)
        updates, hook = toys.recorded_gradients()
        try:
            result = train(model, loader, objective or toys.objective, run_dir=tmp_path / name, **settings, **kwargs)
        finally:
            hook.remove()
        return model, result, updates

    return run


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def big_batch(toys, dtype=torch.float32):
    return next(iter(toys.ToyLoader(8, dtype=dtype)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_any_split_into_micro_batches_gives_the_gradients_of_one_batch(toys, run, dtype, tolerance):
    reference = toys.Toy().to(dtype)
    loss, count, _ = toys.objective(reference, big_batch(toys, dtype))
    (loss / count).backward()
    expected = [p.grad for p in reference.parameters()]
    # The batch is uneven, so that a mean of means would be wrong.
    batch = big_batch(toys)["targets"]
    assert len({(row != -100).sum().item() for row in batch}) > 1
    for accumulate in (1, 2, 4, 8):
        *_, updates = run(
            name=f"a{accumulate}",
            dtype=dtype,
            steps=1,
            trainer={"accumulate": accumulate},
            # One group, so that the order is that of the model.
            optimizer={"clip_norm": None, "weight_decay": 0.0},
        )
        assert len(updates) == 1
        for found, wanted in zip(updates[0], expected, strict=True):
            if wanted is None:
                assert found is None
            else:
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_updates_are_those_of_a_hand_written_loop_bit_for_bit(toys, run):
    ours, result, _ = run(steps=7, trainer={"accumulate": 2}, optimizer={"clip_norm": 0.8})

    model = toys.Toy()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    batches = iter(toys.ToyLoader(4))
    norms = []
    for step in range(7):
        total = 0
        for _ in range(2):
            loss, count, _ = toys.objective(model, next(batches))
            loss.backward()
            total += int(count)
        parameters = [p for p in model.parameters() if p.grad is not None]
        for p in parameters:
            p.grad /= total
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.8).item())
        warm = min(step + 1, 3) / 3
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * max(step - 3, 0) / 4)) / 2
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * (warm if step < 3 else cosine)
        adamw.step()
        adamw.zero_grad()
    assert min(norms) < 0.8 < max(norms)  # some updates are clipped
    assert result["last"]["grad_norm"] == norms[-1]
    for (name, found), wanted in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_ramp_changes_the_batch_size_at_its_update(toys, run):
    # The toys' loader gives micro-batches of one size: 2 x 4, then 4 x 4.
    ramp = [BatchChange(from_step=3, batch_size=16, accumulate=4)]
    _, result, _ = run(steps=5, trainer={"accumulate": 2, "ramp": ramp})
    assert result["samples"] == 3 * 8 + 2 * 16
    with pytest.raises(ValueError, match="batch_size 9 must be a multiple of accumulate x processes = 2 x 1"):
        run(name="odd", trainer={"ramp": [BatchChange(from_step=3, batch_size=9, accumulate=2)]})
    with pytest.raises(ValueError, match="ramp must be in ascending order of from_step"):
        run(name="order", trainer={"ramp": [ramp[0], ramp[0]]})


def test_untouched_parameters_are_neither_moved_nor_decayed(toys, run):
    before = toys.Toy()
    model, *_, updates = run(steps=3, images=range(8, 16))  # the image part is touched in the second update
    assert torch.equal(model.unused.weight, before.unused.weight)
    assert not torch.equal(model.text.output.weight, before.text.output.weight)
    touched = [sum(g is not None for g in update) for update in updates]
    assert touched[0] == touched[2] == touched[1] - 4

    untouched, *_ = run(name="never", steps=3, images=())
    assert torch.equal(untouched.image[0].weight, before.image[0].weight)


def test_decay_is_for_matrices_unless_a_rule_says_otherwise(toys):
    model = toys.Toy()
    names = {id(p): name for name, p in model.named_parameters()}

    def decays(**config):
        trained = [name for name in names.values() if not name.startswith("unused")]
        settings = toys.configs(optimizer=config)["optimizer"]
        groups = build_optimizer(model, trained, settings).param_groups
        return {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}

    found = decays()
    assert found["text.output.weight"] == (0.1, 1.0)
    assert found["text.norm.weight"] == found["text.output.bias"] == (0.0, 1.0)
    assert not any(name.startswith("unused") for name in found)
    rules = [
        GroupRule(pattern="text.*", lr_scale=0.5),
        GroupRule(pattern="text.norm.*", weight_decay=0.2),
        GroupRule(pattern="image.0.*", lr_scale=2.0, weight_decay=0.0),
    ]
    found = decays(groups=rules)
    assert found["text.output.weight"] == (0.1, 0.5)
    assert found["text.output.bias"] == (0.0, 0.5)
    assert found["text.norm.weight"] == (0.2, 1.0)
    assert found["image.0.weight"] == (0.0, 2.0)
    with pytest.raises(ValueError, match=r"optimizer group 'imag\.\*' matches no parameter; nearest: image"):
        decays(groups=[GroupRule(pattern="imag.*")])


def test_learning_rate_scale_and_schedule_reach_the_weights(toys, run):
    rules = [GroupRule(pattern="text.*", lr_scale=0.0)]
    model, *_ = run(steps=2, optimizer={"groups": rules})
    before = toys.Toy()
    assert torch.equal(model.text.output.weight, before.text.output.weight)
    assert not torch.equal(model.image[0].weight, before.image[0].weight)


def test_frozen_parts_stay_and_a_rule_thaws_them(toys, run, capsys):
    seen = []

    def objective(model, batch):
        seen.append((model.text.training, model.image.training, model.text.output.weight.requires_grad))
        return toys.objective(model, batch)

    rules = [
        FreezeRule(pattern="text.*", trainable=False),
        FreezeRule(pattern="text.output.*", trainable=True, from_step=2),
    ]
    before = toys.Toy()
    model, result, updates = run(steps=4, freeze=rules, objective=objective)
    assert seen == [(False, True, False)] * 2 + [(True, True, True)] * 2
    assert torch.equal(model.text.embedding.weight, before.text.embedding.weight)
    assert not torch.equal(model.text.output.weight, before.text.output.weight)
    assert model.text.seen == 2  # buffers of frozen modules in eval mode rest
    assert [sum(g is not None for g in update) for update in updates] == [4, 4, 6, 6]
    assert result["trained_parameters"] < result["parameters"]
    table = capsys.readouterr().err
    assert "what trains from step 0 on" in table
    assert "what trains from step 2 on" in table
    assert f"{sum(p.numel() for p in model.image.parameters()):,}" in table
    with pytest.raises(ValueError, match="nothing to train"):
        run(name="frozen", freeze=[FreezeRule(pattern="*", trainable=False)])


def test_flags_and_modes_come_back(toys, run):
    model = toys.Toy()
    model.text.norm.bias.requires_grad_(False)
    model.text.dropout.eval()
    run(model=model, steps=1, freeze=[FreezeRule(pattern="image.*", trainable=False)])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["text.norm.bias"]
    assert [name for name, m in model.named_modules() if not m.training] == ["text.dropout"]
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_is_autocast_around_the_forward_pass_alone(toys, run):
    seen = []

    def objective(model, batch):
        seen.append(model.text.output(torch.ones(1, 16)).dtype)
        loss, count, metrics = toys.objective(model, batch)
        loss.register_hook(lambda g: seen.append(torch.is_autocast_enabled("cpu")))
        return loss, count, metrics

    _model, *_, updates = run(steps=1, objective=objective, trainer={"precision": "bfloat16"})
    assert seen == [torch.bfloat16, False]
    assert {g.dtype for g in updates[0] if g is not None} == {torch.float32}
    with pytest.raises(ValueError, match=r"text\.embedding\.weight is torch\.bfloat16"):
        run(name="low", model=toys.Toy().to(torch.bfloat16))
    low = toys.Toy()
    low.text.to(torch.bfloat16)
    run(
        name="frozen-low",
        model=low,
        steps=1,
        trainer={"precision": "bfloat16"},
        freeze=[FreezeRule(pattern="text.*", trainable=False)],
    )


@pytest.mark.parametrize("native", ["float32", "bfloat16"])
def test_automatic_precision_is_what_the_device_has_and_stays_what_it_was(toys, run, monkeypatch, tmp_path, native):
    seen = []

    def objective(model, batch):
        seen.append(model.text.output(torch.ones(1, 16)).dtype)
        return toys.objective(model, batch)

    monkeypatch.setattr(trainer, "native_precision", lambda device: native)
    run(steps=2, objective=objective, trainer={"precision": "auto"})
    assert set(seen) == {getattr(torch, native)}
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["trainer"]["precision"] == native
    other = {"float32": "bfloat16", "bfloat16": "float32"}[native]
    monkeypatch.setattr(trainer, "native_precision", lambda device: other)
    with pytest.raises(RunDirectoryError, match=f"trainer.precision: .{native}. -> .{other}."):
        run(steps=4, trainer={"precision": "auto"})
    run(steps=4, trainer={"precision": native})


def test_only_bfloat16_units_make_it_the_native_precision(monkeypatch):
    for units, native in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert precision.native_precision(torch.device("cpu")) == native
    assert precision.native_precision(torch.device("meta")) == "float32"


def poisoned(toys, number, poison):
    calls = 0

    def objective(model, batch):
        nonlocal calls
        loss, count, metrics = toys.objective(model, batch)
        calls += 1
        return (poison(loss), count, metrics) if calls - 1 == number else (loss, count, metrics)

    return objective


POISONS = {
    "loss": (lambda loss: loss * math.nan, "the loss is nan"),
    # A finite loss whose gradient is not: the derivative of sqrt at zero.
    "gradient": (lambda loss: loss + (loss - loss.detach()).abs().sqrt(), "the gradient norm is nan"),
}


@pytest.mark.parametrize("kind", POISONS)
def test_non_finite_updates_stop_the_run_before_they_are_made(toys, run, tmp_path, kind):
    poison, reason = POISONS[kind]
    model = toys.Toy()
    with pytest.raises(NonFiniteError) as caught:
        run(model=model, objective=poisoned(toys, 5, poison))
    assert f"step 6: {reason}" in str(caught.value)
    assert "step-00000004" in str(caught.value)
    if kind == "gradient":
        assert "text.embedding.weight" in str(caught.value)
    five, *_ = run(name="five", steps=12, loader=toys.ToyLoader(8), objective=poisoned(toys, 99, poison))
    assert latest_complete(tmp_path / "run").name == "step-00000004"
    assert all(p.isfinite().all() for p in model.parameters())
    # The same run goes on from the good checkpoint once the cause is gone.
    again, *_ = run()
    for found, wanted in zip(again.parameters(), five.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", POISONS)
def test_non_finite_updates_can_be_skipped_and_are_counted(toys, run, tmp_path, capsys, kind):
    poison, reason = POISONS[kind]
    model, result, updates = run(
        steps=6, objective=poisoned(toys, 2, poison), trainer={"non_finite": "skip", "log_every": 1}
    )
    assert result["skipped_steps"] == 1
    assert len(updates) == 5
    assert math.isfinite(result["mean"]["loss"])
    assert all(p.isfinite().all() for p in model.parameters())
    assert f"step 3: {reason}" in capsys.readouterr().err
    logged = lines(tmp_path / "run")
    assert [line["skipped_steps"] for line in logged] == [0, 0, 1, 1, 1, 1]
    assert logged[2]["loss"] is None
    assert (
        result["tokens"]
        == sum((b["targets"] != -100).sum().item() for b in some(toys, 6))
        - (some(toys, 6)[2]["targets"] != -100).sum().item()
    )


def some(toys, number):
    batches = iter(toys.ToyLoader(8))
    return [next(batches) for _ in range(number)]


def test_an_update_without_targets_is_left_out_and_counted(toys, run, capsys):
    def objective(model, batch):
        if calls.append(0) or len(calls) == 2:
            batch = {**batch, "targets": torch.full_like(batch["targets"], -100)}
        return toys.objective(model, batch)

    calls = []
    model, result, updates = run(steps=3, objective=objective)
    assert result["empty_steps"] == 1
    assert len(updates) == 2
    assert all(p.isfinite().all() for p in model.parameters())
    assert "step 2: no targets" in capsys.readouterr().err


def test_the_log_has_means_over_its_interval(toys, run, tmp_path):
    _model, result, _ = run(steps=7, optimizer={"lr": 1e-30}, schedule={"kind": "constant"}, images=range(8, 16))
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [3, 6, 7]
    batches = some(toys, 7)
    reference = toys.Toy()
    with torch.no_grad():
        sums = [
            toys.objective(reference, {**b, "has_image": b["has_image"] & (i == 1)})[:2] for i, b in enumerate(batches)
        ]
    for line, part in zip(logged, (sums[:3], sums[3:6], sums[6:]), strict=True):
        mean = sum(loss.item() for loss, _ in part) / sum(int(count) for _, count in part)
        assert line["loss"] == pytest.approx(mean, rel=1e-6)
    assert logged[0]["images"] == 8
    assert "images" not in logged[1]
    assert logged[-1]["tokens"] == sum(int(count) for _, count in sums) == result["tokens"]
    assert logged[-1]["samples"] == 56 == result["samples"]
    assert result["mean"]["loss"] == pytest.approx(
        sum(loss.item() for loss, _ in sums) / sum(int(count) for _, count in sums), rel=1e-6
    )
    assert logged[1]["lr"] == 1e-30
    for name in ("tokens_per_second", "peak_memory_bytes", "wall_seconds", "grad_norm"):
        assert logged[0][name] > 0
    assert result["last"] == logged[-1]


def test_evaluation_leaves_no_trace_in_training(toys, run, tmp_path):
    modes = []

    def evaluate(model, step):
        modes.append((step, model.training, torch.is_grad_enabled()))
        return {"draw": torch.rand(()).item(), "bad": math.inf}

    plain, *_ = run(model=toys.Toy(0.3), steps=5)
    model, result, _ = run(model=toys.Toy(0.3), name="e", steps=5, evaluate=evaluate, trainer={"evaluate_every": 2})
    assert modes == [(2, False, False), (4, False, False), (5, False, False)]
    assert model.text.dropout.training
    assert 0 <= result["evaluation"]["draw"] < 1
    assert result["evaluation"]["bad"] is None
    assert [line["step"] for line in lines(tmp_path / "e") if "evaluation" in line] == [2, 4, 5]
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_loader_that_ends_is_an_error(toys, run):
    with pytest.raises(LoaderExhaustedError, match=r"ended at step 2 of 12, all 16 samples.*trainer.steps to 2"):
        run(loader=toys.ToyLoader(8, end=16))


def test_the_last_update_is_made_of_what_there_is(toys, run):
    whole, result, _ = run(steps=3, loader=toys.ToyLoader(8, end=21))
    in_pieces, again, _ = run(name="pieces", steps=3, loader=toys.ToyLoader(2, end=21), trainer={"accumulate": 4})
    assert result["tokens"] == again["tokens"]
    batches = list(toys.ToyLoader(8, end=21))
    assert [len(batch["tokens"]) for batch in batches] == [8, 8, 5]
    for a, b in zip(whole.parameters(), in_pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_metric_with_the_name_of_a_field(toys, run):
    def objective(model, batch):
        loss, count, _ = toys.objective(model, batch)
        return loss, count, {"lr": (1, 1)}

    with pytest.raises(ValueError, match="metric 'lr'"):
        run(objective=objective)


def test_run_directory_describes_the_run(run, tmp_path):
    _, result, _ = run(steps=1, description="stage one", resolved_recipe={"data": {"seed": 3}})
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["data"] == {"seed": 3}
    assert recipe["optimizer"]["lr"] == 1e-2
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["threads"] == torch.get_num_threads()
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["description"] == "stage one"


def test_move():
    class Own:
        def to(self, device):
            return f"moved to {device}"

    device = torch.device("meta")
    moved = move({"a": torch.ones(1), "b": [torch.ones(1), "text", 3], "c": (Own(),)}, device)
    assert moved["a"].device == moved["b"][0].device == device
    assert moved["b"][1:] == ["text", 3]
    assert moved["c"] == ("moved to meta",)


def test_it_learns(toys, run):
    # One batch over and over: the loss goes where only fitting it can take it.
    class Same(toys.ToyLoader):
        def __iter__(self):
            while True:
                yield big_batch(toys)

    model, result, _ = run(
        steps=80, loader=Same(8), trainer={"log_every": 1, "checkpoint_every": 80}, optimizer={"lr": 3e-2}
    )
    with torch.no_grad():
        batch = big_batch(toys)
        logits = model(batch["tokens"], batch["images"], batch["has_image"])
        final = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    assert final < 0.4 * result["mean"]["loss"]
    assert result["last"]["lr"] == pytest.approx(3e-2 * fraction(toys.configs()["schedule"], 79, 80))
