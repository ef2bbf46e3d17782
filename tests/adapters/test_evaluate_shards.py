"""Questions of shards, and what the command writes about the answers."""

import io
import json
import sys

import herdkit
import numpy as np
import pytest
import torch
from herdkit.adapters import compose
from herdkit.adapters.chat import reply_batch
from herdkit.adapters.evaluate_command import gallery
from herdkit.adapters.evaluate_questions import PROMPTS, question_of, worded
from herdkit.adapters.evaluate_shards import Evaluation, Marked, Mean, caption_scores, report
from herdkit.cli import main
from herdkit.data.dialogs import Part
from herdkit.data.shards import Sample, ShardReader, ShardWriter
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


def run(folder, out, *settings, model="model"):
    shards = str(folder / "*.tar")
    return main(["evaluate", str(folder / model), shards, "--out", str(out), "--max-new-tokens", "4", *settings])


def read(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_the_command_scores_and_shows(folder, capsys):
    out = folder / "result"
    assert run(folder, out, "--batch-size", "4") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["score"] == pytest.approx(4 / 6)
    result = json.loads((out / "result.json").read_text())
    assert result["kinds"]["even"]["score"] == pytest.approx(2 / 3)
    assert result["mean"]["interval"] == pytest.approx(1.96 * (4 / 6 * 2 / 6 / 6) ** 0.5)
    lines = read(out)
    assert [line["score"] for line in lines] == [1, 1, 1, 1, 0, 0]
    model = herdkit.load(folder / "model")
    assert lines[0]["prompt"].startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>what")
    assert model.tokenizer.decode(lines[0]["tokens"], keep_special=True) == lines[0]["prompt"]
    page = (out / "wrong.html").read_text()
    assert "2 of 6 answers are not wholly right" in page
    assert page.count("<img ") == 2
    assert "nothing of that" in page
    assert run(folder, out, "--without", "image") == 1
    assert "was made with batch_size = 4, not 16" in capsys.readouterr().err
    assert run(folder, folder / "without", "--without", "image") == 0
    assert all("<|image|>" not in line["prompt"] for line in read(folder / "without"))


def test_killed_at_any_byte_it_goes_on_to_the_same_files(folder, monkeypatch):
    whole, out = folder / "whole", folder / "resumed"
    assert run(folder, whole, "--batch-size", "2") == 0
    asked = []

    def killed(self, model, samples, stop_after):
        asked.append(list(samples))
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        return real(self, model, samples)

    real = Evaluation._batch
    monkeypatch.setattr(Evaluation, "_batch", lambda *arguments: killed(*arguments, 3))
    assert run(folder, out, "--batch-size", "2") == 130
    partial = out / "answers.jsonl.partial"
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl.partial", "answers.jsonl.settings.json"]
    partial.write_bytes(partial.read_bytes()[:-9])
    assert run(folder, out, "--batch-size", "2") == 0
    # The batch whose last line was cut runs again, as a whole.
    assert asked == [[0, 1], [2, 3], [4, 5], [2, 3], [4, 5]]
    assert not partial.exists()
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    monkeypatch.undo()
    (out / "wrong.html").unlink()
    assert run(folder, out, "--batch-size", "2") == 0
    assert (out / "wrong.html").read_bytes() == (whole / "wrong.html").read_bytes()


def test_what_shards_say_is_no_part_of_the_page(folder, tmp_path):
    bad = "<script>alert('&')</script>"
    content = {"question": bad, "answers": [bad], "kind": bad, "choices": [bad, "never said"]}
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        writer.write("<b>", {"png": b"<script>", "json": content})
        writer.write("two", {"png": png(1), "json": content})
    answers = [
        Marked(i, "<b>", bad, bad, bad, [], [bad], [bad, "never said"], bad, 0.0, understood)
        for i, understood in enumerate((bad, None))
    ]
    page = gallery(answers, report(answers, "choice"), ShardReader(str(tmp_path / "*.tar")))
    assert "<script" not in page
    assert "<b>" not in page
    # Kind, question, answer and right answer of both, the kind in the table, and what one was taken for.
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 10
    assert "could not be told" in page


def sample(members=("png",), **content) -> Sample:
    return Sample("007", "made.tar", {**{name: png(1) for name in members}, "json": json.dumps(content).encode()})


def shown(parts):
    return [part.text if part.type == "text" else part.type for part in parts]


def test_questions_are_put_in_the_words_of_the_paper():
    asked = question_of(
        sample(question="What is it?", choices=["red", "blue"], answer="B"), ("image",), PROMPTS["choice"]
    )
    (message,) = asked.prompt
    assert message.text == (
        "Select the correct answer from the following options: What is it? (A) red (B) blue. "
        "Answer with the correct option letter and nothing else."
    )
    assert message.parts[0].type == "image"
    assert asked.answers == ["B"]
    short = question_of(sample(question="What is it?", answers=["red"]), ("image",), PROMPTS["short"])
    assert short.prompt[-1].text == "Answer the question using a single word or phrase. What is it?"
    dialog = [
        {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
    ]
    asked = question_of(sample(messages=dialog, kind="colour", choices=["red", "blue"]), ("image",), "{question}")
    assert (asked.kind, asked.answers, asked.prompt[-1].text) == ("colour", ["red"], "what?")


@pytest.mark.parametrize(
    ("parts", "prompt", "expected"),
    [
        (["image", "What?"], "short", ["image", "Answer in a word. ", "What?", ""]),
        (["Is ", "image", " like ", "image2", " here"], "short",
         ["Answer in a word. ", "Is ", "image", " like ", "image", " here", "."]),
        (["This: ", "image"], "short", ["Answer in a word. ", "This: ", "image", ""]),
        (["audio"], "short", ["Answer in a word. ", "audio", ""]),
        ([" a.. b?. {choices} {question} "], "none", [" a.. b?. {choices} {question} "]),
        ([" a.. b?. {choices} c "], "short", ["Answer in a word. ", "a.. b?. {choices} c", "."]),
    ],
)  # fmt: skip
def test_media_and_text_stay_in_their_order_and_text_as_it_is(parts, prompt, expected):
    prompts = {"short": "Answer in a word. {question}.", "none": "{question}"}
    asked = [
        Part(part.rstrip("2"), media=b"") if part.startswith(("image", "audio")) else Part("text", text=part)
        for part in parts
    ]
    made = shown(worded(prompts[prompt], asked))
    assert [part for part in made if part] == [part for part in expected if part]


def test_all_media_of_a_question_stand_in_the_order_of_the_shard():
    asked = question_of(
        sample(("b.jpeg", "sound.opus", "a.gif", "mov", "txt"), question="what?", answer="x"),
        ("image", "audio", "video"),
        "{question}",
    )
    assert shown(asked.prompt[0].parts) == ["image", "audio", "image", "video", "what?"]


def test_every_choice_is_listed():
    asked = question_of(
        sample(question="which?", choices=[f"n{i}" for i in range(30)], answer="n29"), ("image",), PROMPTS["choice"]
    )
    assert "(Z) n25 (AA) n26 (AB) n27 (AC) n28 (AD) n29." in asked.prompt[0].text


@pytest.mark.parametrize(
    ("members", "content", "message"),
    [
        (["png"], {"question": "what?"}, "no right answer"),
        (["png"], {"answers": ["x"]}, "neither messages nor a question"),
        (["png"], {"messages": [{"role": "user", "content": "hm"}]}, "must end with a question and its answer"),
        (["png"], {"question": "what?", "answers": "x"}, "answers must be a list, not 'x'"),
        (["png"], {"question": "what?", "answer": "x", "choices": "xyz"}, "choices must be a list, not 'xyz'"),
        (["flac"], {"question": "what?", "answer": "x"}, "its member 'flac' is audio, which the model has no adapter"),
        (["heic"], {"question": "what?", "answer": "x"}, "what its member 'heic' is cannot be told"),
    ],
)
def test_what_is_missing_is_named(members, content, message):
    with pytest.raises(ValueError, match=f"made.tar: sample 007.*{message}"):
        question_of(sample(members, **content), ("image",), "{question}")


def test_mistakes_of_the_command_are_named_before_anything_is_asked(folder, capsys, monkeypatch, tmp_path):
    out = folder / "none"
    for settings, message in (
        (["--metric", "choice"], "sample 0 has no choices"),
        (["--prompt", "choice"], "sample 0 has no choices, which the prompt lists"),
        (["--prompt", "hm"], "'hm' must hold {question} once"),
        (["--prompt", "{question} {options}"], "no other word in braces; known prompts are none, choice, short"),
        (["--limit", "0"], "limit must be at least 1, not 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
    ):
        assert run(folder, out, *settings) == 1
        assert message in capsys.readouterr().err
    for metric, package in (("caption", "sacrebleu"), ("anls", "rapidfuzz")):
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, package, None)
            hidden.setitem(sys.modules, f"{package}.distance", None)
            assert run(folder, out, "--metric", metric, model="no model at all") == 1
        assert f"{package} is missing: pip install" in capsys.readouterr().err
    (tmp_path / "model").symlink_to(folder / "model")
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        for key, answer in (("one", "A"), ("two", "C")):
            writer.write(key, {"json": {"question": "?", "choices": ["red", "blue"], "answer": answer}})
    assert run(tmp_path, out, "--metric", "choice") == 1
    assert "sample two: the right answer 'C' is none of the choices ['red', 'blue']" in capsys.readouterr().err
    assert not out.exists()


def test_intervals_and_captions():
    assert Mean.of([1, 0, 1, 1]).interval == pytest.approx(1.96 * (0.75 * 0.25 / 4) ** 0.5)
    texts = ["a red circle on the left of a big blue star", "a green ring"]
    found = caption_scores(texts, [[texts[0]], ["a green ring", "one ring"]])
    assert found["bleu"][0] == pytest.approx(100)
    assert found["chrf"][0] == pytest.approx(100)
    assert caption_scores(["a"], [["something else entirely"]])["chrf"][0] < 20
