import json
import random
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig, open_loader
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.model_directory import load_text, save_text
from herdkit.text.objective import next_token
from herdkit.text.posttrain.sft import DialogTextCollator, SFTRecipe, run
from herdkit.text.rows import IGNORE, Document, lay_out
from herdkit.text.stages import even_rows
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig
from herdkit.train.layout import ParallelConfig

PROGRAM = Path(__file__).parents[1] / "pretraining.py"


def make_model(vocab_size):
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 48, "max_seq_len": 64}
    return Transformer(TransformerConfig(vocab_size=vocab_size, **sizes))


@pytest.fixture
def recipe(tokenizer, tmp_path):
    """On dialogs of many lengths, so that four of them fill two rows, or three."""
    rng = random.Random(0)
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        for i in range(64):
            said = ["".join(rng.choices("abcdef", k=rng.choice((1, 1, 16)))) for _ in range(2)]
            dialog = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            writer.write(f"{i:02d}", {"json": {"messages": dialog}})
    save_text(make_model(tokenizer.vocab_size), tokenizer, tmp_path / "init")
    return SFTRecipe(
        stage="text.sft",
        init=str(tmp_path / "init"),
        data=DataConfig(sources=[SourceConfig(shards=str(tmp_path / "*.tar"))], row_length=64),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(),
        trainer=TrainerConfig(steps=6, batch_size=8, accumulate=2),
    )


def test_a_pipeline_takes_micro_batches_of_any_number_of_rows(recipe, tokenizer, finish_program, tmp_path):
    collate = DialogTextCollator(tokenizer, recipe.data.row_length)
    rows = [len(batch.tokens) for batch in islice(open_loader(recipe.data, collate, 4), 12)]
    assert any(first != second for first, second in list(pairwise(rows))[::2])
    alone = run(recipe, tmp_path / "alone")
    recipe.parallel = ParallelConfig(pipeline=2)
    shared = tmp_path / "shared"
    assert finish_program(PROGRAM, 2, recipe=recipe, run_dir=str(shared), stage="posttrain.sft") == [0, 0]
    result = json.loads((shared / "result.json").read_text())
    assert result["tokens"] == alone["tokens"]
    for name in ("loss", "accuracy"):
        assert result["mean"][name] == pytest.approx(alone["mean"][name], rel=1e-4)
    found, wanted = (load_text(path / "model")[0].state_dict() for path in (shared, tmp_path / "alone"))
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4, msg=name)


def documents(*lengths):
    return [Document(list(range(5, 5 + length)), [True] * length) for length in lengths]


def test_even_rows_change_no_loss_and_no_gradient():
    model = make_model(80).double()
    batches = [
        lay_out([documents(5, 7), documents(3)], 0),  # several documents in a row
        lay_out([documents(9)], 0),  # one in each
        lay_out([documents(4), documents(20), documents(2, 2)], 0),
    ]
    assert [batch.documents is None for batch in batches] == [False, True, False]
    losses = {}
    for name, made in (("as they are", batches), ("even", even_rows(batches))):
        model.zero_grad()
        outcomes = [next_token(model, batch) for batch in made]
        sum(outcome[0] for outcome in outcomes).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        losses[name] = [(outcome[0].item(), int(outcome[1])) for outcome in outcomes], gradients
    assert {batch.tokens.shape for batch in even_rows(batches)} == {(3, 20)}
    for (loss, count), (same, also) in zip(losses["as they are"][0], losses["even"][0], strict=True):
        assert (same, also) == (pytest.approx(loss, rel=1e-12), count)
    torch.testing.assert_close(losses["even"][1], losses["as they are"][1], rtol=1e-10, atol=1e-12)
    for batch, padded in zip(batches, even_rows(batches), strict=True):
        there = torch.zeros_like(padded.labels, dtype=torch.bool)
        there[: len(batch.tokens), : batch.tokens.shape[1]] = True
        assert (padded.labels[~there] == IGNORE).all()
        if padded.documents is not None:
            assert set(padded.documents[~there].tolist()).isdisjoint(batch.documents.flatten().tolist())
