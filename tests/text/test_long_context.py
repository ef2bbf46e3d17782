import dataclasses
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig
from herdkit.data.synthetic.needles import haystacks, write_haystacks
from herdkit.text import RopeScaling, Tokenizer, Transformer, TransformerConfig
from herdkit.text.held_out import HeldOutConfig
from herdkit.text.long_context import Length, LongContextRecipe, NotPromotedError, Promotion, run
from herdkit.text.model_directory import load_text, save_text
from herdkit.text.needle import NeedleConfig, NeedleTest
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig
from torch.nn import functional as F

PROSE = [f"the {colour} {shape} moves {way} and stays there." for colour in ("red", "blue", "green")
         for shape in ("circle", "star") for way in ("up", "down", "left")]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    with ShardWriter(root / "prose" / "%06d.tar") as writer:
        for i in range(60):
            writer.write(f"{i:04d}", {"txt": " ".join(rng.choices(PROSE, k=4)).encode()})
    write_haystacks(root / "haystacks", PROSE, 60, (10, 120), spacing=40)
    tokenizer = Tokenizer.train([*PROSE, *haystacks(PROSE, 50, (5, 20), 5, 1)], 800)
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=64
    )
    save_text(Transformer(config), tokenizer, root / "model")
    return root


@pytest.fixture
def recipe(made):
    def shards(name):
        return SourceConfig(shards=str(made / name / "*.tar"), name=name)

    return LongContextRecipe(
        stage="text.long_context",
        init=str(made / "model"),
        rope_scaling=RopeScaling(original_max_seq_len=64),
        data=DataConfig(sources=[shards("haystacks")], row_length=64),
        window=30,
        lengths=[Length(row_length=96, steps=3, batch_size=4), Length(row_length=160, steps=2, batch_size=2)],
        promotion=Promotion(found=0.0, tolerance=0.5, rounds=2),
        held_out=HeldOutConfig(sources=[shards("prose")], samples=10),
        needle=NeedleConfig(prose=[shards("prose")], depths=3, samples=1),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(kind="constant"),
        trainer=TrainerConfig(steps=1, batch_size=1),
    )


class Reader:
    """In place of a model: gives what followed the last word but one where the same two tokens stood before, looking
    back so many tokens at most."""

    def __init__(self, vocabulary, reach):
        self.tok_embeddings = SimpleNamespace(weight=torch.zeros(1))
        self.vocabulary, self.reach = vocabulary, reach

    def hidden(self, tokens):
        row = tokens[0].tolist()
        given = []
        for end in range(len(row)):
            before = row[max(0, end - self.reach) : end + 1]
            matches = [i for i in range(4, len(before) - 1) if before[i - 4 : i + 1] == before[-5:]]
            given.append(before[matches[-1] + 1] if matches else 0)
        return F.one_hot(torch.tensor(given), self.vocabulary).float()[None]

    def unembed(self, hidden):
        return hidden


def test_every_hidden_password_is_asked_for_after_it():
    sentence = r"(what is )?the password of (\w+)(?:\? the password of \2)? is (\w+)\."
    lengths = []
    for text in haystacks(PROSE, 40, (20, 200), 20, 0):
        hidden, asked = {}, {}
        for question, owner, password in re.findall(sentence, text):
            if question:
                assert hidden[owner] == password
            (asked if question else hidden)[owner] = password
        assert hidden == asked
        words = len(re.sub(sentence, "", text).split())
        assert len(hidden) == words // 20
        lengths.append(words)
    assert 20 <= min(lengths) < max(lengths) / 4 <= 50


def test_haystacks_have_their_length_and_the_needle_at_its_depth(recipe, made):
    _, tokenizer = load_text(made / "model")
    test = NeedleTest(recipe.needle, tokenizer)
    for depth, low, high in ((0.0, 0, 0.05), (0.5, 0.4, 0.6), (1.0, 0.75, 1.0)):
        prompt, answer = test.haystack(200, depth, 0)
        assert len(prompt) + len(answer) == 200
        text = tokenizer.decode(prompt)
        owner = text.partition("the password of ")[2].partition(" is ")[0]
        statement = f"the password of {owner} is{tokenizer.decode(answer)}."
        assert low <= text.index(statement) / len(text) <= high
        assert text.endswith(f"what is the password of {owner}? the password of {owner} is")
        assert text.count(tokenizer.decode(answer).strip()) == 1
    assert test.haystack(200, 0.5, 0) == test.haystack(200, 0.5, 0) != test.haystack(200, 0.5, 1)
    with pytest.raises(ValueError, match=r"needs .* tokens of prose; there are"):
        test.haystack(100_000, 0.5, 0)


def test_needles_are_found_where_the_model_can_see(recipe, made):
    _, tokenizer = load_text(made / "model")
    test = NeedleTest(dataclasses.replace(recipe.needle, depths=5, samples=3), tokenizer)
    everything = test(Reader(tokenizer.vocab_size, 10_000), [100, 300])
    assert everything.worst == 1
    near = test(Reader(tokenizer.vocab_size, 100), [100, 300])
    assert near.found[0] == [1] * 5
    assert near.found[1][:3] == [0] * 3
    assert near.found[1][4] == 1
    assert near.depths == [0, 0.25, 0.5, 0.75, 1]


def test_it_grows_when_promoted_and_is_resumed(recipe, tmp_path, monkeypatch):
    result = run(recipe, tmp_path)
    assert [(check["row_length"], check["promoted"]) for check in result["checks"]] == [(96, True), (160, True)]
    assert [len(check["needle"]["found"]) for check in result["checks"]] == [2, 3]
    model, _ = load_text(tmp_path / "model")
    assert model.config.max_seq_len == 160
    assert model.config.rope_scaling == RopeScaling(original_max_seq_len=64)
    for length in (96, 160):
        assert (tmp_path / f"length-{length}" / "round-0" / "needle.png").stat().st_size > 5000

    def refuse(*_):
        raise AssertionError("what is finished is not measured again")

    monkeypatch.setattr(NeedleTest, "__call__", refuse)
    assert run(recipe, tmp_path) == result


def test_a_model_that_has_not_adapted_is_trained_more_and_then_refused(recipe, tmp_path):
    recipe.promotion = Promotion(found=1.0, tolerance=0.5, rounds=2)
    with pytest.raises(NotPromotedError, match=r"after 2 rounds at 96 tokens .* needles at some length and depth 0%"):
        run(recipe, tmp_path)
    orders = []
    for number in (0, 1):
        here = tmp_path / "length-96" / f"round-{number}"
        assert not json.loads((here / "check.json").read_text())["promoted"]
        orders.append(json.loads((here / "recipe.json").read_text())["data"]["seed"])
    assert orders == [0, 1], "other documents first"
    assert not (tmp_path / "length-160").exists()


def test_short_rows_must_recover(recipe, tmp_path):
    recipe.optimizer = OptimizerConfig(lr=1.0)
    recipe.promotion = Promotion(found=0.0, tolerance=0.01, rounds=1)
    with pytest.raises(NotPromotedError, match=r"prose_loss is \d+\.\d+ on short rows, \d\.\d+ before"):
        run(recipe, tmp_path)


def test_impossible_recipes_are_refused(recipe):
    with pytest.raises(ValueError, match=r"ascending order of row_length, not \[160, 96\]"):
        dataclasses.replace(recipe, lengths=recipe.lengths[::-1])
    with pytest.raises(ValueError, match="held_out: promotion needs short documents"):
        dataclasses.replace(recipe, held_out=None)
