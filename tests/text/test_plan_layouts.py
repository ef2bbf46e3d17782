import json
from importlib.resources import files

import pytest
from herdkit.cli import main
from herdkit.text import preset
from herdkit.text.plan_layouts import cost, layouts_of_phase
from herdkit.text.plan_time import flops_per_token
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


PAPER = {"tensor": 8, "pipeline": 16, "shard": None, "schedule": "interleaved", "chunks": 8}


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


SELECTIVE = {"shard": None, "reshard": True, "recompute": "selective"}
FULL = {"shard": None, "reshard": True, "recompute": "full"}


@pytest.mark.parametrize(
    ("model", "hardware", "devices", "planned", "parallel", "published"),
    [
        # torchtitan, compiled: December 2024, June 2025 (its plain tensor parallel), and the 405B of July 2024.
        ("8b", "h100-500w", 8, phase(8192, 16), SELECTIVE, 6667),
        ("8b", "h100-500w", 128, phase(8192, 256), SELECTIVE, 6514),
        ("8b", "h100-500w", 64, phase(8192, 96), {"tensor": 8, **SELECTIVE}, 4378),
        ("70b", "h100-500w", 256, phase(8192, 512), {"tensor": 8, **FULL}, 597),
        ("405b", "h100-500w", 128, phase(8192, 32), {"tensor": 8, **FULL}, 109),
        # OLMo-core, whose batch is not stated; with one row a device it would be 6% slower.
        ("8b", "h100", 64, phase(4096, 128), {"shard": None, "reshard": True}, 9500),
    ],
)
def test_speed_is_what_others_measured(model, hardware, devices, planned, parallel, published):
    made = predicted(model, hardware, devices, planned, **parallel)
    assert made["tokens_per_second"] == pytest.approx(published, rel=0.10)


def test_memory_is_what_torchtitan_measured():
    # It holds the logits of all positions: in bfloat16, and in float32 with their gradient. We make a chunk at a time.
    for devices, measured in ((8, 77.0), (128, 62.0)):
        made = predicted("8b", "h100-500w", devices, phase(8192, 2 * devices), **SELECTIVE)
        parts = made["memory_bytes"][0]
        logits = (2 + 4 + 4) * 2 * 8192 * 128_256
        assert (parts["total"] - parts["logits"] + logits) / 2**30 == pytest.approx(measured, rel=0.05)


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
    assert made["refused"]["memory"]["example"].startswith("840.8 of 80.0 GiB with")
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
