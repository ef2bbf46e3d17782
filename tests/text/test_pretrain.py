import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig
from herdkit.text.held_out import HeldOutConfig
from herdkit.text.model import TransformerConfig
from herdkit.text.model_directory import load_text
from herdkit.text.pretrain import PretrainRecipe, run
from herdkit.text.row_loader import Phase
from herdkit.train import LoaderExhaustedError, OptimizerConfig, ScheduleConfig, TrainerConfig
from herdkit.train.layout import ParallelConfig

PROGRAM = Path(__file__).with_name("pretraining.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    words = ["red", "green", "blue", "circle", "square", "star"]
    for name, count in (("train", 300), ("new", 20)):
        with ShardWriter(root / name / "%06d.tar") as writer:
            for i in range(count):
                text = " ".join(rng.choices(words, k=3) * rng.randint(1, 5))
                dialog = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
                writer.write(f"{i:04d}", {"txt": text.encode()} if i % 3 else {"json": json.dumps(dialog).encode()})
    return root


@pytest.fixture
def recipe(shards):
    return PretrainRecipe(
        stage="text.pretrain",
        model=TransformerConfig(
            dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, vocab_size=540, max_seq_len=128
        ),
        data=DataConfig(sources=[SourceConfig(shards=str(shards / "train" / "*.tar"), name="made")], row_length=48),
        window=64,
        phases=[Phase(from_tokens=10 * 8 * 48, row_length=96, batch_size=16, accumulate=2)],
        held_out=HeldOutConfig(sources=[SourceConfig(shards=str(shards / "new" / "*.tar"), name="new")], row_length=64),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant", warmup_steps=5),
        trainer=TrainerConfig(steps=24, batch_size=8, evaluate_every=12, checkpoint_every=8),
    )


def test_it_learns_with_a_ramp_and_measures_what_is_held_out(recipe, tmp_path):
    result = run(recipe, tmp_path)
    assert result["samples"] == 10 * 8 + 14 * 16
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["evaluation"]["new_loss"] for line in lines if "evaluation" in line]
    assert len(held_out) == 2
    assert math.log(540) > held_out[0] > held_out[1] + 0.3
    assert result["mean"]["row_fill"] > 0.8


def test_a_run_in_two_parts_is_the_run(recipe, tmp_path):
    run(recipe, tmp_path / "straight")
    half = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, steps=13))
    run(half, tmp_path / "parts")
    run(recipe, tmp_path / "parts")
    wanted, _ = load_text(tmp_path / "straight" / "model")
    found, _ = load_text(tmp_path / "parts" / "model")
    for name, weight in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


LAYOUTS = {
    "pipeline": {"pipeline": 2, "context": 2},
    "interleaved": {"pipeline": 2, "schedule": "interleaved", "chunks": 2},
    "fsdp": {"shard": None},
    "tensor": {"shard": 2, "tensor": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_makes_the_same_model_to_the_last_row_of_its_data(recipe, finish_program, tmp_path, layout):
    once = dataclasses.replace(recipe.data.sources[0], epochs=1)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sources=[once]),
        phases=[],
        model=dataclasses.replace(recipe.model, n_kv_heads=2),
        trainer=TrainerConfig(steps=1000, batch_size=8, accumulate=2, evaluate_every=12, checkpoint_every=8),
    )
    with pytest.raises(LoaderExhaustedError) as error:
        run(recipe, tmp_path / "longer")
    steps = int(re.findall(r"set trainer.steps to (\d+)", str(error.value))[0])
    recipe = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, steps=steps))
    alone = run(recipe, tmp_path / "alone")
    assert alone["samples"] % 8 or alone["mean"]["row_fill"] < 0.95  # the last update is not full
    shared = dataclasses.replace(recipe, parallel=ParallelConfig(**layout))
    assert finish_program(PROGRAM, 4, recipe=shared, run_dir=str(tmp_path / "shared")) == [0] * 4
    result = json.loads((tmp_path / "shared" / "result.json").read_text())
    assert result["tokens"] == alone["tokens"]
    assert result["parameters"] == alone["parameters"]
    for name in ("loss", "accuracy"):
        assert result["mean"][name] == pytest.approx(alone["mean"][name], rel=1e-3)
    # Rows that make up the last update of a layout are empty.
    assert 0.9 * alone["mean"]["row_fill"] < result["mean"]["row_fill"] <= alone["mean"]["row_fill"]
    assert result["trained_parameters"] == alone["trained_parameters"]
    assert result["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-4)
    wanted, _ = load_text(tmp_path / "alone" / "model")
    found, _ = load_text(tmp_path / "shared" / "model")
    for name, weight in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=1e-3, msg=name)


def test_rows_longer_than_the_model_are_refused(recipe, tmp_path):
    recipe.phases[0].row_length = 256
    with pytest.raises(ValueError, match=r"rows of 256 tokens are longer than model.max_seq_len \(128\)"):
        run(recipe, tmp_path)
