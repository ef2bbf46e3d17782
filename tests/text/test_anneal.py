import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from herdkit.cli import main
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig
from herdkit.text import Tokenizer, Transformer, TransformerConfig
from herdkit.text.anneal import AnnealRecipe, probe, run
from herdkit.text.held_out import HeldOut, HeldOutConfig
from herdkit.text.model_directory import load_text, save_text
from herdkit.text.row_stage import document_encoder
from herdkit.train import CheckpointError, FreezeRule, OptimizerConfig, ScheduleConfig, TrainerConfig, dump
from herdkit.train.averaging import average_checkpoints
from herdkit.train.checkpoint import list_checkpoints, load_tensors
from herdkit.train.layout import ParallelConfig

PROGRAM = Path(__file__).with_name("pretraining.py")

WORDS = {"old": ["red", "green", "blue"], "new": ["one", "two", "three"], "noise": list("qxzvkjw")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of three vocabularies, documents held out of the first two, and an untrained model."""
    root = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    texts = []
    for name, words in [*WORDS.items(), ("held_old", WORDS["old"]), ("held_new", WORDS["new"])]:
        with ShardWriter(root / name / "%06d.tar") as writer:
            for i in range(60 if name.startswith("held") else 200):
                texts.append(" ".join(rng.choices(words, k=rng.randint(3, 20))))
                writer.write(f"{i:04d}", {"txt": texts[-1].encode()})
    tokenizer = Tokenizer.train(texts, 540)
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=64
        )
    )
    save_text(model, tokenizer, root / "model")
    return root


def source(made, name):
    return SourceConfig(shards=str(made / name / "*.tar"), name=name)


@pytest.fixture
def recipe(made):
    return AnnealRecipe(
        stage="text.anneal",
        init=str(made / "model"),
        average=3,
        data=DataConfig(sources=[source(made, "old")], row_length=32),
        window=64,
        held_out=HeldOutConfig(sources=[source(made, "held_old"), source(made, "held_new")]),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="linear", final_fraction=0),
        trainer=TrainerConfig(steps=20, batch_size=8, checkpoint_every=4, keep=3),
    )


def test_the_result_is_the_mean_of_the_checkpoints(recipe, made, tmp_path):
    result = run(recipe, tmp_path)
    assert result["averaged_steps"] == [20, 16, 12]
    assert result["averaged_evaluation"].keys() == result["evaluation"].keys() == {"held_old_loss", "held_new_loss"}
    assert result["averaged_evaluation"] != result["evaluation"]
    assert result["evaluation"]["held_old_loss"] < result["evaluation"]["held_new_loss"]
    model, _ = load_text(tmp_path / "model")
    paths = list_checkpoints(tmp_path)
    for name, weight in model.named_parameters():
        stored = []
        for path in paths:
            values = {f"model.{name}": torch.empty_like(weight)}
            load_tensors(path, values)
            stored.append(values[f"model.{name}"])
        torch.testing.assert_close(weight.detach(), torch.stack(stored).mean(0))
        assert not torch.equal(stored[0], stored[1])
    again = run(recipe, tmp_path)
    assert again == result, "a finished run gives the same"


def test_processes_that_share_the_model_average_and_measure_their_parts(recipe, finish_program, tmp_path):
    recipe = dataclasses.replace(
        recipe,
        average=2,
        freeze=[FreezeRule(pattern="layers.0.*", trainable=False, from_step=4)],  # right after an evaluation
        trainer=TrainerConfig(steps=8, batch_size=8, checkpoint_every=4, evaluate_every=4),
    )
    alone = run(recipe, tmp_path / "alone")
    wanted = load_text(tmp_path / "alone" / "model")[0].state_dict()
    shared = dataclasses.replace(recipe, parallel=ParallelConfig(shard=2))
    assert finish_program(PROGRAM, 2, stage="anneal", recipe=shared, run_dir=str(tmp_path / "shared")) == [0, 0]
    result = json.loads((tmp_path / "shared" / "returned.json").read_text())
    assert result["averaged_steps"] == alone["averaged_steps"] == [8, 4]
    for key in ("evaluation", "averaged_evaluation"):
        assert result[key] == pytest.approx(alone[key], rel=1e-4)
    found = load_text(tmp_path / "shared" / "model")[0].state_dict()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4)


def test_too_few_checkpoints_are_refused(recipe, made, tmp_path):
    with pytest.raises(ValueError, match="average is 4, but the run takes 5 checkpoints and keeps 3"):
        AnnealRecipe(**{**vars(recipe), "average": 4})
    run(recipe, tmp_path)
    model, _ = load_text(made / "model")
    with pytest.raises(CheckpointError, match="keeps 3 checkpoints and 5 are to be averaged"):
        average_checkpoints(model, tmp_path, 5)


def test_a_probe_tells_good_data_from_noise(recipe, made, tmp_path):
    good = probe(recipe, source(made, "new"), tmp_path / "good")["gains"]
    assert good["held_new"]["gain"] > 5 * good["held_new"]["interval"] > 0
    assert good["held_new"]["documents"] == 60
    noise = probe(recipe, source(made, "noise"), tmp_path / "noise")["gains"]
    assert noise["held_old"]["gain"] < good["held_new"]["gain"] / 10
    assert noise["held_old"]["without"] == good["held_old"]["without"]
    written = json.loads((tmp_path / "good" / "probe.json").read_text())
    assert written["gains"] == good
    recorded = json.loads((tmp_path / "good" / "with" / "recipe.json").read_text())
    assert {s["name"]: s["weight"] for s in recorded["data"]["sources"]} == {"old": 0.7, "new": 0.3}


def test_the_interval_is_that_of_resampled_documents(recipe, made, tmp_path):
    found = probe(recipe, source(made, "new"), tmp_path)["gains"]["held_new"]
    losses = {}
    for name in ("without", "with"):
        model, tokenizer = load_text(tmp_path / name / "model")
        held_out = HeldOut(recipe.held_out, document_encoder(tokenizer), tokenizer.pad_id, 32)
        losses[name] = held_out.document_losses(model)["held_new"]
    difference, count = losses["without"][:, 0] - losses["with"][:, 0], losses["with"][:, 1]
    drawn = torch.randint(60, (4000, 60), generator=torch.Generator().manual_seed(0))
    gains = difference[drawn].sum(1) / count[drawn].sum(1)
    assert found["gain"] == pytest.approx((difference.sum() / count.sum()).item())
    assert found["interval"] == pytest.approx(1.96 * gains.std().item(), rel=0.1)


def test_the_command(recipe, made, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    arguments = ["probe", str(tmp_path / "recipe.yaml"), "--new", str(made / "new" / "*.tar"), "--run-dir"]
    assert main([*arguments, str(tmp_path / "run"), "--share", "0.5", "trainer.steps=12"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    gains = json.loads(last)["gains"]
    assert any(line.startswith("held_new") and f"{gains['held_new']['gain']:.4f}" in line for line in said)
    assert main([*arguments, str(tmp_path / "run"), "--share", "1.5"]) == 1
    assert "share must be between 0 and 1" in capsys.readouterr().err
