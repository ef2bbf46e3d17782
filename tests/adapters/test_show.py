"""`herdkit shards show`: what it says of tokens is what training makes of them."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from herdkit.adapters import DialogCollator, compose, load_ports, register_adapter, save
from herdkit.adapters.dialog_page import dialog_page
from herdkit.adapters.sample_tokens import SampleEncoder, token_lengths
from herdkit.cli import main
from herdkit.data.media import load_audio, load_image
from herdkit.data.shards import Sample, ShardWriter
from herdkit.text import Tokenizer, Transformer
from herdkit.text.model import TransformerConfig
from herdkit.text.row_stage import document_encoder
from PIL import Image
from toy_adapters import MemoryAdapter, SoftAdapter, SoftPreparation, ToyConfig, VectorPreparation

IGNORE = -100


class Pictures(VectorPreparation):
    def load(self, source):
        picture = torch.as_tensor(np.asarray(load_image(source)).copy())
        return picture[:5, :6, 0].float()


class Sounds(SoftPreparation):
    """A soft token for each tenth of a second."""

    def load(self, source):
        return torch.zeros(len(load_audio(source)) // 1600, 6)


class PictureAdapter(MemoryAdapter):
    kind = "test picture"

    def __init__(self, config, text):
        super().__init__(config, text)
        self.prepare = Pictures()


class SoundAdapter(SoftAdapter):
    kind = "test sound"

    def __init__(self, config, text):
        super().__init__(config, text)
        self.prepare = Sounds()


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_adapter("test picture", PictureAdapter)
    register_adapter("test sound", SoundAdapter)


def png(colour=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


def flac(seconds):
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(round(16_000 * seconds)) / 9) / 2, 16_000, format="FLAC")
    return file.getvalue()


def user(*parts):
    return {"role": "user", "content": list(parts)}


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


IMAGE, SOUND = {"type": "image", "image": "png"}, {"type": "audio", "audio": "flac"}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]


def words(text):
    return {"type": "text", "text": text}


DIALOGS = {
    "plain": [user(words("what is it")), say("a dog & a <b>cat</b>")],
    "media": [user(IMAGE, words("what\n\nis it"), SOUND), say("a cat"), user(IMAGE), say("a dog\nand\n\n\na cat")],
    "letters": [{"role": "system", "content": "naïve 日本"}, user(words("🐈‍⬛?")), say("🦮 Привет\u200b"), say(" ")],
    "tools": [user(words("a <|eot_id|>?")), say("", tool_calls=CALL, end="eom"), {"role": "tool", "content": " 7 "}],
}


def stored(key):
    members = {"json": json.dumps({"messages": DIALOGS[key], "kind": "x"}).encode()}
    if key == "media":
        members |= {"png": png(), "flac": flac(0.75)}
    return Sample(key, "s.tar", members)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory, registered):
    tokenizer = Tokenizer.train(["what is it a dog and a cat look listen weather Oslo city"], 540)
    config = TransformerConfig(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=256
    )
    torch.manual_seed(0)
    model = compose(
        Transformer(config), tokenizer=tokenizer,
        image=PictureAdapter(ToyConfig(), config), speech=SoundAdapter(ToyConfig(), config),
    )  # fmt: skip
    return save(model, tmp_path_factory.mktemp("model") / "model")


class Page(HTMLParser):
    """The tokens of each dialog of a page as a reader of it sees them: (id or special token's name, in the loss)."""

    def __init__(self, text):
        super().__init__()
        self.dialogs, self.texts, self.kind = {}, {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "h2":
            self.kind = "key"
        elif tag == "span" and "data-ids" in attributes:
            loss = "loss" in attributes["class"].split()
            self.tokens += [(int(id), loss) for id in attributes["data-ids"].split()]
            self.kind = "loss" if loss else "other"
        elif tag == "figcaption":
            self.kind = "placeholder"

    def handle_endtag(self, tag):
        if tag in ("span", "h2", "figcaption") and not (tag == "span" and self.kind == "placeholder"):
            self.kind = None

    def handle_data(self, data):
        if self.kind == "key":
            self.tokens = self.dialogs.setdefault(data, [])
            self.text = self.texts.setdefault(data, [])
            self.kind = None
        elif self.kind == "placeholder":
            name, _, count = data.partition(" x ")
            self.tokens += [(name, False)] if name else [self.tokens[-1]] * (int(count) - 1)
        elif self.kind == "loss":
            self.text.append(data)


def test_marked_tokens_are_the_labels_of_training(model_directory):
    tokenizer, ports = load_ports(model_directory)
    samples = [stored(key) for key in DIALOGS]
    page = Page(dialog_page(samples, SampleEncoder(model_directory)))
    assert list(page.dialogs) == list(DIALOGS)
    collate = DialogCollator(tokenizer, ports)
    for sample in samples:
        batch = collate([(0, sample)])
        shown = page.dialogs[sample.key]
        ids = [tokenizer.special(id) if isinstance(id, str) else id for id, _ in shown]
        assert ids == batch.tokens[0].tolist()
        labels = batch.labels[0].tolist()
        assert [id if loss else IGNORE for id, (_, loss) in zip(ids, shown, strict=True)][1:] == labels[:-1]
        assert not shown[0][1]
        assert sum(loss for _, loss in shown) == sum(label != IGNORE for label in labels) > 0
    sound = tokenizer.special("<|audio|>")
    assert [id for id, _ in page.dialogs["media"]].count("<|audio|>") == 7  # 0.75 s
    assert sound in collate([(0, stored("media"))]).tokens[0].tolist()


def test_what_is_marked_can_be_read(model_directory):
    page = Page(dialog_page([stored(key) for key in DIALOGS], SampleEncoder(model_directory)))
    assert "".join(page.texts["plain"]) == "a dog & a <b>cat</b><|eot_id|>"
    assert "".join(page.texts["media"]).replace("\n", "") == "a cat<|eot_id|>a dog⏎and⏎⏎⏎a cat<|eot_id|>"
    assert "".join(page.texts["letters"]) == "🦮 Привет\u200b<|eot_id|><|eot_id|>"
    called = '{"name": "weather", "parameters": {"city": "Oslo"}}'
    assert "".join(page.texts["tools"]) == f"<|python_tag|>{called}<|eom_id|>"


def test_page_shows_the_media_and_runs_nothing(model_directory):
    text = dialog_page([stored("media"), stored("plain")], SampleEncoder(model_directory))
    figures = re.findall(r'<img alt="(\w+)" src="data:image/png;base64,.*?&lt;\|(\w+)\|&gt;', text)
    assert figures == [("image", "image"), ("audio", "audio"), ("image", "image")]
    assert "<b>" not in text
    assert "<script" not in text
    evil = Sample("<script>alert(1)</script>", "s.tar", {"json": b'{"messages": []}'})
    text = dialog_page([evil], SampleEncoder(model_directory))
    assert "<script" not in text
    assert "messages is empty" in text
    assert dialog_page([Sample("a", "s.tar", {"txt": b"x"})], SampleEncoder(model_directory)) is None


def test_ports_are_those_of_the_adapters_without_weights(model_directory, tmp_path):
    copy = shutil.copytree(model_directory, tmp_path / "copy")
    for weights in copy.glob("*.safetensors"):
        weights.unlink()
    _, ports = load_ports(copy)
    assert [(port.part, type(port.prepare)) for port in ports] == [("image", Pictures), ("audio", Sounds)]


def test_lengths(model_directory):
    encode = SampleEncoder(model_directory)
    tokenizer, ports = load_ports(model_directory)
    texts = [Sample(str(i), "s.tar", {"txt": b"a dog " * i, "json": b'{"source": 1}'}) for i in range(1, 4)]
    others = [Sample("n", "s.tar", {"npy": b"x"}), Sample("b", "s.tar", {"json": b'{"messages": 1}', "txt": b"x"})]
    kinds, problems = token_lengths([*map(stored, DIALOGS), *texts, *others], encode)
    collate = DialogCollator(tokenizer, ports)
    batches = [collate([(0, stored(key))]) for key in DIALOGS]
    dialogs = kinds["dialog"]
    assert dialogs.lengths.total == sum(batch.tokens.numel() for batch in batches)
    assert dialogs.lengths.most == max(batch.tokens.numel() for batch in batches)
    assert dialogs.in_loss == sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    assert dialogs.stand_ins == []
    documents = document_encoder(tokenizer)(texts)
    assert kinds["text"].lengths.total == sum(map(len, documents))
    assert kinds["text"].in_loss == sum(map(len, documents)) - 3
    assert [(problem.key, problem.reason) for problem in problems] == [("b", "messages must be a list, not int")]


def test_media_without_an_adapter_count_as_one_token(model_directory):
    encode = SampleEncoder(model_directory / "tokenizer.json")
    kinds, problems = token_lengths([stored("media")], encode)
    assert kinds["dialog"].stand_ins == ["audio", "image"]
    assert problems == []
    with_ports, _ = token_lengths([stored("media")], SampleEncoder(model_directory))
    assert with_ports["dialog"].lengths.total - kinds["dialog"].lengths.total == 6
    assert "No adapter for image, video, audio was given" in dialog_page([stored("media")], encode)


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "data" / "d-%d.tar", max_count=3) as writer:
        for key in DIALOGS:
            writer.write(key, stored(key).members)
        writer.write("broken", {"png": png()[:60], "txt": b"\xff"})
    return tmp_path / "data"


def run(capsys, *arguments):
    code = main(["shards", "show", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_command(shards, tmp_path, capsys, model_directory):
    out_folder = tmp_path / "look"
    code, out, err = run(capsys, shards, "--tokenizer", model_directory, "--out", out_folder, "--count", "3")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("2 shards, 5 samples, ")
    assert [line.split(":")[0] for line in lines if ": json " in line or ", json " in line] == list(DIALOGS)[:3]
    result = json.loads(lines[-1])
    assert sorted(path.name for path in out_folder.iterdir()) == [
        "audio.png",
        "damaged.jsonl",
        "dialogs.html",
        "images.png",
    ]
    assert (result["shards"], result["samples"], result["damaged"]) == (2, 5, 1)  # the one that tokens were counted of
    assert result["tokens"]["dialog"]["count"] == 4
    pixels = np.asarray(Image.open(out_folder / "images.png"))
    assert ((pixels == (200, 30, 30)).all(axis=-1)).sum() == 200 * 150  # 40 x 30, five times as large
    assert "broken" not in Page((out_folder / "dialogs.html").read_text()).dialogs
    code, out, _ = run(capsys, shards, "--out", out_folder, "--check")
    assert code == 0
    assert "dialogs are shown with --tokenizer MODEL" in out
    assert f"{shards / 'd-1.tar'}: sample broken: png: cannot decode" in out
    assert sorted(path.name for path in out_folder.iterdir()) == ["audio.png", "damaged.jsonl", "images.png"]
    report = [json.loads(line) for line in (out_folder / "damaged.jsonl").read_text().splitlines()]
    assert [one["reason"][:4] for one in report] == ["png:", "txt:"]


def test_one_sample(shards, capsys):
    code, out, _ = run(capsys, shards, "--sample", "letters")
    assert code == 0
    assert "🦮 Привет\\u200b" in out
    assert json.loads(out.splitlines()[-1])["damaged"] == 0
    code, _, err = run(capsys, shards, "--sample", "none")
    assert (code, err) == (1, "herdkit: no sample has the key 'none'\n")


def test_what_a_terminal_would_obey_is_shown(tmp_path, capsys):
    with ShardWriter(tmp_path / "%d.tar") as writer:
        writer.write("a\x1b[2J", {"txt": "red \x1b[31m\r\u202e\n\ttab", "json": {"a": "\x1b"}})
    code, out, _ = run(capsys, tmp_path, "--sample", "a\x1b[2J")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "red \\x1b[31m" in out


def test_errors_are_one_line(shards, tmp_path, capsys):
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    for arguments, error in [
        ([tmp_path / "none"], "cannot open: No such file"),
        ([tmp_path / "bad.tar"], "no shard of 1 can be read; the first: "),
        ([str(tmp_path / "x-*.tar")], "no shards there"),
        ([shards, "--tokenizer", tmp_path], "no config.json in it"),
        ([shards, "--tokenizer", shards / "d-0.tar"], "d-0.tar"),
        ([shards, "--count", "0"], "--count must be at least 1"),
    ]:
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert err.startswith("herdkit: ")
        assert err.count("\n") == 1
        assert error in err
    with pytest.raises(SystemExit) as caught:
        main(["shards", "show"])
    assert caught.value.code == 2


def test_damaged_shards_do_not_hide_the_others(shards, capsys):
    (shards / "d-2.tar").write_bytes((shards / "d-0.tar").read_bytes()[:700])
    code, out, _ = run(capsys, shards)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["samples"] == 5
    assert f"{shards / 'd-2.tar'}: truncated" in out
