import json
from dataclasses import asdict
from importlib.resources import files

import pytest
import torch
from herdkit.cli import main
from herdkit.text import Transformer, TransformerConfig, preset
from herdkit.text.plan import activation_bytes, plan_pretraining
from herdkit.text.pretrain import PretrainRecipe
from herdkit.text.row_loader import plan_phases
from herdkit.text.row_stage import flops_of_rows
from herdkit.train import load_recipe
from herdkit.train.plan import Hardware

PARAMETERS = {"1b": 1_235_814_400, "8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}
RECIPES = files("herdkit") / "text" / "recipes"


def recipe(name, *overrides) -> PretrainRecipe:
    return load_recipe(RECIPES / f"pretrain_{name}.yaml", PretrainRecipe, overrides)


def test_a_run_counts_the_operations_that_were_planned():
    made = recipe("1b", "trainer.steps=400_000")
    with torch.device("meta"):
        model = Transformer(made.model)
    plan = plan_pretraining(made, Hardware(devices=8))
    phases = plan_phases(made.phases, made.trainer, made.data)
    assert len(phases) > 1
    flops = flops_of_rows(model, phases)
    assert sum(map(flops, range(400_000))) == pytest.approx(plan["flops"])


@pytest.mark.parametrize(("name", "lr"), [("1b", 4e-4), ("8b", 3e-4), ("70b", 1.5e-4), ("405b", 8e-5)])
def test_recipes_train_the_papers_models(name, lr):
    made = recipe(name)
    # The released models got their scaled rotations and their length with the long context.
    released = asdict(preset(name)) | {"rope_scaling": None, "max_seq_len": 8192}
    assert asdict(made.model) == released
    assert made.optimizer.lr == lr
    assert (made.schedule.warmup_steps, made.trainer.steps) == (8000, 1_200_000)
    assert lr * made.schedule.final_fraction == pytest.approx(lr / 100)


def test_the_plan_of_the_largest_model_is_the_papers():
    plan = plan_pretraining(
        recipe("405b", "trainer.steps=1_117_000"), Hardware(devices=16_384, data_parallel=128, mfu=0.41)
    )
    assert plan["parameters"]["total"] == 405_853_388_800
    assert plan["tokens"] == pytest.approx(15.6e12, rel=0.03)
    # Section 3.2.1: 3.8e25 operations, of which ours count attention too.
    assert plan["flops"] == pytest.approx(3.8e25, rel=0.06)
    assert [phase["from_step"] for phase in plan["phases"]] == [0, 60_082, 372_172]
    assert sum(phase["tokens"] for phase in plan["phases"]) == plan["tokens"]
    assert plan["days"] == pytest.approx(plan["flops"] / (16_384 * 989e12 * 0.41 * 86_400))
    assert plan["memory_bytes"]["weights"] == round(4 * 405_853_388_800 / 16_384)


@pytest.mark.parametrize("name", ["1b", "8b", "70b", "405b"])
def test_the_later_stages_can_be_planned(name, capsys):
    hardware = ["--model", name, "--devices", "1024", "--data-parallel", "1"]
    for stage, tokens in (("long_context", 800e9), ("anneal", 40e9)):
        assert main(["plan", str(RECIPES / f"{stage}_{name}.yaml"), *hardware]) == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert plan["tokens"] == pytest.approx(tokens, rel=0.01)
        assert plan["parameters"]["total"] == PARAMETERS[name]
        assert plan["phases"][-1]["row_length"] == 131_072
    assert main(["plan", str(RECIPES / f"anneal_{name}.yaml")]) == 1
    assert "say which with --model PRESET" in capsys.readouterr().err


def test_activations_are_what_autograd_keeps():
    config = TransformerConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=448, vocab_size=300)
    model = Transformer(config)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.zeros(2, 128, dtype=torch.int64))
    assert sum(size for size, _ in kept.values()) == pytest.approx(2 * 128 * activation_bytes(config, 4), rel=0.1)


def test_a_batch_for_fewer_devices_is_refused():
    with pytest.raises(ValueError, match="batch_size 1024 must be a multiple of accumulate x processes = 1 x 3000"):
        plan_pretraining(recipe("8b"), Hardware(devices=3000))


def test_the_command(capsys):
    assert main(["plan", str(RECIPES / "pretrain_8b.yaml"), "trainer.steps=10", "--devices", "8"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["tokens"] == 10 * 1024 * 4096
    assert said[0] == "8,030,261,248 parameters, 10 updates, 41,943,040 tokens"
    assert main(["plan", str(RECIPES / "tiny_sft.yaml")]) == 1
    assert "the stage 'text.sft'" in capsys.readouterr().err
    assert main(["plan", str(RECIPES / "pretrain_8b.yaml"), "--mfu", "1.4"]) == 1
    assert "mfu in (0, 1]" in capsys.readouterr().err
