"""Questions of shards, and what the command writes about the answers."""

import io
import json

import herdkit
import numpy as np
import pytest
import torch
from herdkit.adapters import compose
from herdkit.adapters.chat import reply_batch
from herdkit.adapters.evaluate_shards import PROMPTS, Mean, caption_scores, question_of
from herdkit.cli import main
from herdkit.data.shards import Sample, ShardWriter
from herdkit.text import Tokenizer, Transformer, TransformerConfig
from herdkit.vision.image_adapter import ImageAdapter, ImageAdapterConfig
from PIL import Image


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["what is it? a red circle. (A) (B) answer letter"] * 9, 560)
    text = TransformerConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=256
    )
    encoder = {"type": "herdkit", "image_size": 16, "patch_size": 8, "dim": 16, "n_layers": 1, "n_heads": 2}
    config = ImageAdapterConfig(encoder=encoder | {"ffn_dim": 32}, n_cross_layers=1, gate_init=0.5)
    return compose(Transformer(text), tokenizer, image=ImageAdapter(config, text)).eval()


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model, and shards whose right answers are what it says to some of the questions."""
    folder = tmp_path_factory.mktemp("evaluate")
    herdkit.save(model, folder / "model")
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": png(i)}, {"type": "text", "text": "what is it?"}]}]
        for i in range(6)
    ]
    said = reply_batch(model, asked, max_new_tokens=4)
    with ShardWriter(folder / "%06d.tar", existing="replace") as writer:
        for i, answer in enumerate(said):
            right = answer if i < 4 else "nothing of that"
            content = {"question": "what is it?", "answers": [right, "x"], "kind": "odd" if i % 2 else "even"}
            writer.write(f"{i}", {"png": png(i), "json": content})
    return folder


def test_the_command_scores_and_shows(folder, capsys):
    out = folder / "result"
    settings = ["--out", str(out), "--max-new-tokens", "4", "--batch-size", "4"]
    assert main(["evaluate", str(folder / "model"), str(folder / "*.tar"), *settings]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["score"] == pytest.approx(4 / 6)
    result = json.loads((out / "result.json").read_text())
    assert result["kinds"]["even"]["score"] == pytest.approx(2 / 3)
    assert result["mean"]["interval"] == pytest.approx(1.96 * (4 / 6 * 2 / 6 / 6) ** 0.5)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [1, 1, 1, 1, 0, 0]
    model = herdkit.load(folder / "model")
    assert lines[0]["prompt"].startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>what")
    assert model.tokenizer.decode(lines[0]["tokens"], keep_special=True) == lines[0]["prompt"]
    page = (out / "wrong.html").read_text()
    assert "2 of 6 answers are not wholly right" in page
    assert page.count("<img ") == 2
    assert "nothing of that" in page
    assert "<script" not in page
    assert main(["evaluate", str(folder / "model"), str(folder / "*.tar"), *settings, "--without", "image"]) == 0
    assert all("<|image|>" not in line for line in (out / "answers.jsonl").read_text().splitlines())


def sample(**content) -> Sample:
    return Sample("007", "made.tar", {"png": png(1), "json": json.dumps(content).encode()})


def test_questions_are_put_in_the_words_of_the_paper():
    asked = question_of(
        sample(question="What is it?", options=["red", "blue"], answer="B"), ("image",), PROMPTS["choice"]
    )
    (message,) = asked.prompt
    assert message.text == (
        "Select the correct answer from the following options: What is it? (A) red (B) blue. "
        "Answer with the correct option letter and nothing else."
    )
    assert [part.type for part in message.parts] == ["image", "text"]
    assert asked.answers == ["B"]
    short = question_of(sample(question="What is it?", answers=["red"]), ("image",), PROMPTS["short"])
    assert short.prompt[-1].text == "Answer the question using a single word or phrase. What is it?"
    dialog = [
        {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
    ]
    asked = question_of(sample(messages=dialog, kind="colour"), ("image",), "{question}")
    assert (asked.kind, asked.answers, asked.prompt[-1].text) == ("colour", ["red"], "what?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"question": "what?"}, "sample 007: no right answer"),
        ({"answers": ["x"]}, "neither messages nor a question"),
        ({"messages": [{"role": "user", "content": "hm"}]}, "must end with a question and its answer"),
    ],
)
def test_what_is_missing_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        question_of(sample(**content), ("image",), "{question}")


def test_mistakes_of_the_command_are_named(folder, capsys):
    arguments = ["evaluate", str(folder / "model"), str(folder / "*.tar"), "--out", str(folder / "none")]
    assert main([*arguments, "--metric", "choice"]) == 1
    assert "sample 0 has no options to choose from" in capsys.readouterr().err
    assert main([*arguments, "--prompt", "hm"]) == 1
    assert "'hm' is none of none, choice, short" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_intervals_and_captions():
    assert Mean.of([1, 0, 1, 1]).interval == pytest.approx(1.96 * (0.75 * 0.25 / 4) ** 0.5)
    texts = ["a red circle on the left of a big blue star", "a green ring"]
    found = caption_scores(texts, [[texts[0]], ["a green ring", "one ring"]])
    assert found["bleu"][0] == pytest.approx(100)
    assert found["chrf"][0] == pytest.approx(100)
    assert caption_scores(["a"], [["something else entirely"]])["chrf"][0] < 20
