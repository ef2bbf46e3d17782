import json
import runpy
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from herdkit.cli import main
from herdkit.text import Transformer, TransformerConfig, preset
from herdkit.text.compiled import compile_layers
from herdkit.text.plan_layouts import cost, layouts_of_phase
from herdkit.text.plan_memory import kept_bytes
from herdkit.text.plan_time import flops_per_token
from herdkit.text.recompute import recompute as apply_recompute
from herdkit.text.row_loader import PlannedPhase
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig
from herdkit.train.hardware import accelerator
from herdkit.train.layout import LayoutError, ParallelConfig
from herdkit.train.plan import Cluster
from herdkit.train.recipe import StageRecipe, train_by

RECIPES = files("herdkit") / "text" / "recipes"


def phase(row_length, batch_size, accumulate=1):
    return PlannedPhase(0, row_length, batch_size, accumulate, {})


def predicted(model, hardware, devices, planned, **parallel):
    return cost(preset(model), planned, devices, accelerator(hardware), ParallelConfig(**parallel))


# Like torchtitan's and OLMo-core's, the paper's weights are gathered in bfloat16; its own fused operations count as
# what a compiler makes of them.
FUSED = {"shard": None, "gather": "bfloat16", "compile": "inductor"}
PAPER = {**FUSED, "tensor": 8, "pipeline": 16, "schedule": "interleaved", "chunks": 8}


@pytest.mark.parametrize(
    ("devices", "planned", "context", "mfu"),
    [
        (8192, phase(8192, 2048, 32), 1, 0.43),
        (16_384, phase(8192, 2048, 16), 1, 0.41),
        (16_384, phase(131_072, 128, 16), 16, 0.38),
    ],
)
def test_utilisation_is_that_of_the_papers_table_4(devices, planned, context, mfu):
    made = predicted("405b", "h100", devices, planned, context=context, **PAPER)
    assert made["replicate"] == 1
    assert made["bubble"] == 15 / (8 * planned.accumulate)
    assert made["mfu"] == pytest.approx(mfu, abs=0.03)


@pytest.fixture(scope="module")
def published():
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "published_speed.py"))


def test_speed_is_what_others_measured(published):
    """Compiled and eager runs of torchtitan on H100s and A100s, and OLMo-core's."""
    runs = [run for run in published["RUNS"] if run.speed]
    assert len(runs) == 16
    for run in runs:
        assert published["planned"](run)["speed"] == pytest.approx(run.speed, rel=0.10), run


def test_memory_is_what_torchtitan_measured(published):
    runs = [run for run in published["RUNS"] if run.memory]
    assert len(runs) == 11
    for run in runs:
        # torch's pipelines keep what their last stage gives, and whole gradients, to the end of an update; ours do not.
        least = 0.85 if run.layout.get("pipeline") else 0.95
        assert least <= published["planned"](run)["memory"] / run.memory <= 1.05, run


def test_what_is_said_of_an_eager_run_is_not_of_a_compiled_one():
    planned = phase(8192, 16)
    ways = [
        predicted("8b", "h100", 8, planned, shard=None, reshard=True, **more)
        for more in ({}, {"compile": "inductor"}, {"gather": "bfloat16"}, {"compile": "inductor", "gather": "bfloat16"})
    ]
    autocast, compiled, gathered, both = ways
    assert autocast["step_seconds"] > compiled["step_seconds"] > both["step_seconds"]
    assert autocast["step_seconds"] > gathered["step_seconds"] > both["step_seconds"]
    memory = [way["memory_bytes"][0] for way in ways]
    assert memory[0]["activations"] > memory[1]["activations"] > memory[3]["activations"]
    # Gathered in float32 two units of twice the bytes, and autocast's copies of all weights.
    weights = predicted("8b", "h100", 8, planned, shard=None, gather="bfloat16")["memory_bytes"][0]["working_copy"]
    assert memory[0]["working_copy"] == 2 * memory[2]["working_copy"] + weights
    alone = [predicted("1b", "h100", 1, phase(2048, 1), shard=None, **more) for more in ({}, {"gather": "bfloat16"})]
    assert alone[0] == alone[1]
    assert autocast["traffic_bytes"]["server"] / gathered["traffic_bytes"]["server"] == pytest.approx(12 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("compile", "recompute", "precision"),
    [
        ("none", "none", "float32"),
        ("none", "none", "autocast"),
        ("none", "full", "autocast"),
        ("aot_eager", "none", "autocast"),
        ("aot_eager", "none", "bfloat16"),
        ("aot_eager", "selective", "float32"),
    ],
)
def test_a_layer_keeps_what_is_planned(compile, recompute, precision, monkeypatch):
    # Attention in bfloat16, as on a GPU.
    monkeypatch.setattr("herdkit.text.attention.cpu_has", lambda unit: True)
    torch.compiler.reset()
    config = TransformerConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=448, vocab_size=300)
    model = Transformer(config)
    if precision == "bfloat16":
        model.bfloat16()
    apply_recompute(model, recompute)
    if compile != "none":
        compile_layers(model, compile)
    others = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {shape for weight in model.parameters() for shape in (weight.shape, weight.shape[::-1])}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        # Autocast's copies of weights count as such.
        if storage.data_ptr() not in others and tensor.shape not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    forward = model.layers[1].forward

    def listened(x, shared):
        others.add(shared.turns.untyped_storage().data_ptr())  # there once for all layers
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(x, shared)

    model.layers[1].forward = listened
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        model.hidden(torch.zeros(2, 128, dtype=torch.int64))
    parallel = ParallelConfig(
        recompute=recompute, compile=compile, gather="bfloat16" if precision == "bfloat16" else "float32"
    )
    planned = kept_bytes(config, parallel, 4 if precision == "float32" else 2)
    # Beside it: a number of each norm and each head.
    assert planned <= sum(size for size, _ in kept.values()) / (2 * 128) <= planned + 4 * (2 + 4)


def test_utilisation_counts_attention_whole():
    # The convention of the published figures, in GFLOPs a token.
    assert flops_per_token(preset("8b"), 8192) == pytest.approx(57.9e9, rel=0.001)
    assert flops_per_token(preset("405b"), 8192) == pytest.approx(2625e9, rel=0.001)


def test_what_the_paper_does_saves_what_it_says():
    plain = predicted("405b", "h100", 16_384, phase(8192, 2048, 16), **PAPER)
    assert plain["fits"]  # "8K sequences with no activation checkpointing"
    resharded = predicted("405b", "h100", 16_384, phase(8192, 2048, 16), **PAPER, reshard=True)
    assert resharded["traffic_bytes"]["network"] > plain["traffic_bytes"]["network"]
    one_stage = PAPER | {"schedule": "1f1b", "chunks": 1}
    assert predicted("405b", "h100", 16_384, phase(8192, 2048, 16), **one_stage)["mfu"] < 0.8 * plain["mfu"]
    # Kept activations fall in the order of recomputation, and time rises.
    ways = [
        predicted("405b", "h100", 16_384, phase(8192, 2048, 16), **PAPER, recompute=recompute)
        for recompute in ("none", "selective", "full")
    ]
    assert [way["step_seconds"] for way in ways] == sorted(way["step_seconds"] for way in ways)
    kept = [way["memory_bytes"][1]["activations"] for way in ways]
    assert kept == sorted(kept, reverse=True)


def test_the_fastest_layouts_fit_and_none_is_faster():
    planned, cluster = phase(8192, 64), Cluster(devices=16)
    made = layouts_of_phase(preset("8b"), planned, cluster)
    speeds = [found["tokens_per_second"] for found in made["layouts"]]
    assert len(speeds) == 5
    assert speeds == sorted(speeds, reverse=True)
    assert all(found["fits"] for found in made["layouts"])
    # Within two servers the 8B model is fastest where the weights alone are shared.
    best = made["layouts"][0]["parallel"]
    assert (best["tensor"], best["pipeline"]) == (1, 1)


def test_where_nothing_fits_it_says_why():
    made = layouts_of_phase(preset("405b"), phase(131_072, 6), Cluster(devices=8))
    assert made["layouts"] == []
    assert made["refused"]["memory"]["example"].startswith("845.8 of 80.0 GiB with")
    assert "batch_size 6 is not a multiple of shard x replicate = 8 x 1" in made["refused"]["shard"]["example"]


def test_a_given_layout_is_refused_with_the_arithmetic():
    cluster = Cluster(devices=64, parallel=ParallelConfig(tensor=16, shard=None))
    with pytest.raises(LayoutError, match="16 does not divide n_kv_heads 8"):
        layouts_of_phase(preset("8b"), phase(8192, 64), cluster)


def test_the_command(capsys, tmp_path):
    recipe = str(RECIPES / "pretrain_8b.yaml")
    layout = tmp_path / "layout.yaml"
    layout.write_text("parallel: {shard: null, reshard: true, recompute: selective}\n")
    hardware = ["--devices", "128", "--hardware", "h100", "--parallel", str(layout)]
    assert main(["plan", recipe, "trainer.steps=10", "phases=[]", "trainer.accumulate=4", *hardware]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    plan = json.loads(last)
    found = plan["phases"][0]["layouts"][0]
    assert found["fits"]
    assert plan["days"] == pytest.approx(10 * found["step_seconds"] / 86_400)
    # The block that is printed can be given back.
    block = next(line.strip() for line in said if "parallel: {" in line)
    layout.write_text(block)
    assert main(["plan", recipe, "trainer.steps=10", "phases=[]", "trainer.accumulate=4", *hardware]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == plan

    for wrong, problem in (
        (["--hardware", "h1"], "hardware 'h1' is not known"),
        (["--hardware", "h100", "--mfu", "0.4"], "--mfu: with --hardware or --parallel this is predicted"),
        (["--parallel", "tensor=3"], "parallel.tensor: 128 processes are not a multiple of"),
        (["--hardware", "h100", "trainer.precision=float32"], "plan for bfloat16"),
    ):
        assert main(["plan", recipe, "--devices", "128", *wrong]) == 1
        assert problem in capsys.readouterr().err


def test_the_layout_of_a_recipe_is_planned(capsys):
    arguments = ["plan", str(RECIPES / "pretrain_8b.yaml"), "--devices", "128", "--hardware", "h100"]
    own = ["parallel.tensor=8", "parallel.shard=null"]
    assert main([*arguments, *own]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*arguments, "--parallel", "tensor=8 shard=null"]) == 0
    assert planned == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*arguments, *own, "--parallel", "tensor=4 shard=null"]) == 0
    assert planned != json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_stage_refuses_what_it_cannot_share(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "pretrain_8b.yaml").read_text() + "parallel: {tensor: 8}\n")
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 1
    assert "parallel.tensor: 1 processes are not a multiple of tensor x context" in capsys.readouterr().err
    recipe = StageRecipe(
        stage="made",
        optimizer=OptimizerConfig(lr=1),
        schedule=ScheduleConfig(),
        trainer=TrainerConfig(steps=1, batch_size=1),
        parallel=ParallelConfig(shard=2),
    )
    with pytest.raises(LayoutError, match="stage 'made' trains replicas alone"):
        train_by(recipe, *(None,) * 4)
