import json
from pathlib import Path

import herdkit
import pytest
import torch
from herdkit.adapters import ModelDirectoryError, attach_adapters, compose, register_adapter
from herdkit.cli import main
from herdkit.text import Tokenizer, Transformer, TransformerConfig
from herdkit.text.model_directory import save_text
from safetensors.torch import load_file, save_file
from toy_adapters import MemoryAdapter, SoftAdapter, ToyConfig, randomise


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_adapter("toy-image", MemoryAdapter)
    MemoryAdapter.kind = "toy-image"
    register_adapter("toy-speech", SoftAdapter)
    SoftAdapter.kind = "toy-speech"


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a dog and a cat"], 514)
    config = TransformerConfig(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=64
    )
    adapters = {
        kind.modality: randomise(kind(ToyConfig(width=5), config)).float() for kind in (MemoryAdapter, SoftAdapter)
    }
    return compose(Transformer(config), tokenizer, **adapters)


def test_round_trip_restores_every_bit_and_the_text_file_never_changes(model, tmp_path):
    path = herdkit.save(model, tmp_path / "model")
    assert {p.name for p in path.iterdir()} == {
        "config.json", "text.safetensors", "image.safetensors", "speech.safetensors", "tokenizer.json",
    }  # fmt: skip
    loaded = herdkit.load(path)
    assert loaded.image.config == ToyConfig(width=5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    alone = save_text(model.text, model.tokenizer, tmp_path / "text")
    assert (alone / "text.safetensors").read_bytes() == (path / "text.safetensors").read_bytes()
    assert herdkit.load(path, adapters=["speech"]).modalities == ["speech"]
    assert herdkit.load(alone).modalities == []


def test_saving_replaces_a_model_directory_and_nothing_else(model, tmp_path):
    path = herdkit.save(model, tmp_path / "model")
    model.detach("speech")
    herdkit.save(model, path)
    assert not (path / "speech.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_text("x")
    with pytest.raises(FileExistsError, match="photos exists and is no model directory"):
        herdkit.save(model, other)
    assert (other / "me.jpg").exists()


def test_a_failed_save_leaves_the_old_model_and_no_rubbish(model, tmp_path, monkeypatch):
    path = herdkit.save(model, tmp_path / "model")
    before = (path / "image.safetensors").read_bytes()
    monkeypatch.setattr(Tokenizer, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        herdkit.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (path / "image.safetensors").read_bytes() == before


def test_senses_trained_apart_come_together_on_the_language_model_they_share(model, tmp_path):
    whole = herdkit.save(model, tmp_path / "whole")
    sight, hearing = (herdkit.load(whole, adapters=[name]) for name in ("image", "speech"))
    herdkit.save(hearing, tmp_path / "hearing")
    attach_adapters(sight, tmp_path / "hearing")
    assert sight.modalities == model.modalities
    assert not sight.speech.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(sight.state_dict()[name], tensor), name
    with pytest.raises(ModelDirectoryError, match=r"hearing has no adapter that this model has not.*image.*speech"):
        attach_adapters(sight, tmp_path / "hearing")
    with pytest.raises(ModelDirectoryError, match=r"hearing has no adapter \['video'\]"):
        attach_adapters(sight, tmp_path / "hearing", ["video"])
    stranger = herdkit.load(whole, adapters=["image"])
    with torch.no_grad():
        stranger.text.norm.weight[3] += 1e-3
    with pytest.raises(ModelDirectoryError, match="hearing: its adapters were trained for another language model"):
        attach_adapters(stranger, tmp_path / "hearing")
    assert stranger.modalities == ["image"]
    attach_adapters(stranger, tmp_path / "hearing", other_weights=True)
    assert stranger.modalities == ["image", "speech"]


def test_adapters_join_no_model_of_other_tokens(model, tmp_path):
    """The tokenizer's file may differ, and so may the names of special tokens, as from release to release."""
    whole = herdkit.save(model, tmp_path / "whole")
    content = json.loads(model.tokenizer.to_json())
    for token in content["added_tokens"][11:]:
        token["content"] = f"<|reserved_special_token_{token['id']}|>"
    renamed = Tokenizer.from_json(json.dumps(content))
    assert renamed.to_json() != model.tokenizer.to_json()
    other = Tokenizer.train(["one more, other words, quite others"], 514)
    assert other.vocab_size == model.tokenizer.vocab_size
    for other_weights in (False, True):
        attach_adapters(compose(model.text, renamed), whole, other_weights=other_weights)
        with pytest.raises(ModelDirectoryError, match="whole: its adapters were trained with other tokens"):
            attach_adapters(compose(model.text, other), whole, other_weights=other_weights)
    (whole / "tokenizer.json").unlink()
    with pytest.raises(ModelDirectoryError, match="whole: no tokenizer"):
        attach_adapters(compose(model.text, renamed), whole, other_weights=True)


def test_a_language_model_of_another_layout_takes_adapters_and_only_ours_saves_them(model, tmp_path):
    whole = herdkit.save(model, tmp_path / "whole")
    for layout in ("huggingface", "meta"):
        with pytest.raises(
            ValueError, match=f"layout '{layout}' has no place .* with the adapters image, speech; .*detach them"
        ):
            herdkit.save(model, tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
        herdkit.save(compose(model.text, model.tokenizer), tmp_path / layout, layout)
        bare = herdkit.load(tmp_path / layout)
        assert bare.modalities == []
        attach_adapters(bare, whole)
        assert bare.modalities == model.modalities
        with pytest.raises(ModelDirectoryError, match=rf"{layout} has no adapter \['image'\]"):
            herdkit.load(tmp_path / layout, adapters=["image"])


def test_all_parts_come_in_one_dtype(model, tmp_path):
    path = herdkit.save(model, tmp_path / "model")
    half = herdkit.load(path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    herdkit.save(half, tmp_path / "half")
    again = herdkit.load(tmp_path / "half")
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))


def test_convert_on_the_command_line(model, tmp_path, capsys):
    source = herdkit.save(compose(model.text, model.tokenizer), tmp_path / "ours")

    def convert(source, target, *options):
        return main(["convert", str(tmp_path / source), str(tmp_path / target), *options])

    assert convert("ours", "hf", "--layout", "huggingface", "--max-shard-bytes", "20000") == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "hf"), "layout": "huggingface"}
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert convert("hf", "meta", "--layout", "meta", "--model-parallel", "2") == 0
    assert convert("meta", "back", "--layout", "herdkit") == 0
    assert (tmp_path / "back" / "text.safetensors").read_bytes() == (source / "text.safetensors").read_bytes()
    assert herdkit.load(tmp_path / "back").text.config == model.text.config
    assert convert("meta", "half", "--layout", "herdkit", "--dtype", "bfloat16") == 0
    assert herdkit.load(tmp_path / "half").text.norm.weight.dtype == torch.bfloat16
    assert convert("meta", "back", "--layout", "herdkit") == 1
    assert capsys.readouterr().err.endswith("back exists; choose another path\n")


def spoil(path: Path, change):
    tensors = load_file(path / "image.safetensors")
    change(tensors)
    save_file(tensors, path / "image.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text('{"format": "other"}'), "not a herdkit model"),
        (lambda p: (p / "text.safetensors").unlink(), "text.safetensors: missing"),
        (lambda p: (p / "speech.safetensors").write_bytes(b"\0" * 40), "speech.safetensors: not a whole"),
        (lambda p: spoil(p, lambda t: t.pop("encoder.bias")), "image.safetensors: missing encoder.bias"),
        (lambda p: spoil(p, lambda t: t.update(extra=torch.ones(1))), "surplus extra"),
        (lambda p: spoil(p, lambda t: t.update({"encoder.bias": torch.ones(3)})), r"\(3,\), expected \(32,\)"),
        (lambda p: spoil(p, lambda t: t["encoder.bias"].fill_(float("nan"))), "encoder.bias holds values that are not"),
    ],
)
def test_damage_is_named(model, tmp_path, damage, message):
    path = herdkit.save(model, tmp_path / "model")
    damage(path)
    with pytest.raises(ModelDirectoryError, match=message):
        herdkit.load(path)


def test_unknown_adapters_keys_and_places_are_named(model, tmp_path):
    with pytest.raises(ModelDirectoryError, match="no such model directory"):
        herdkit.load(tmp_path / "nowhere")
    path = herdkit.save(model, tmp_path / "model")
    with pytest.raises(ModelDirectoryError, match=r"no adapter \['sight'\]; it has \['image', 'speech'\]"):
        herdkit.load(path, adapters=["sight"])
    config = json.loads((path / "config.json").read_text())
    config["adapters"]["image"]["config"]["widht"] = 3
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelDirectoryError, match=r"widht.*did you mean 'width'"):
        herdkit.load(path)
    config["adapters"]["image"]["type"] = "toy-imagee"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelDirectoryError, match="did you mean 'toy-image'"):
        herdkit.load(path)
