"""Llama 3.2 Vision in Hugging Face's layout: logits of transformers, and what it does otherwise."""

import json

import herdkit
import mllama_models as mllama
import pytest
import torch
from herdkit.adapters import ModelDirectoryError, attach_adapters, compose, load_ports
from herdkit.adapters.chat import encode_prompts
from herdkit.cli import main
from herdkit.speech import ConformerConfig, SpeechAdapter, SpeechAdapterConfig
from herdkit.text.model import Transformer
from herdkit.vision.encoder import preset
from herdkit.vision.image_adapter import ImageAdapter, placement
from herdkit.vision.interchange.huggingface_config import configs_from_hf
from herdkit.vision.video_adapter import VideoAdapter, VideoAdapterConfig
from mllama_models import IMAGES, LENGTHS, ROWS, our_logits, picture, their_logits
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, MllamaForConditionalGeneration


@pytest.fixture(scope="module")
def tokenizer():
    return mllama.tokenizer()


@pytest.fixture(scope="module")
def released(tmp_path_factory, tokenizer):
    """The directory of a model as transformers writes it, and the model with its deviations put right."""
    model = mllama.tiny()
    path = mllama.save_theirs(model, tmp_path_factory.mktemp("models") / "mllama", tokenizer)
    return path, mllama.by_meta(model)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, lengths=LENGTHS, tolerance: float = 1e-4) -> None:
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row, :length], theirs[row, :length], rtol=0, atol=tolerance)


def test_logits_are_those_of_transformers(released):
    path, theirs = released
    ours = herdkit.load(path)
    expected = their_logits(theirs, ROWS, IMAGES)
    assert_same(our_logits(ours, ROWS, IMAGES), expected)
    # The pictures matter at every position from the first of them on.
    others = our_logits(ours, ROWS, [[picture(28, 28, 9)] * len(row) for row in IMAGES])
    for row, start in ((0, 2), (1, 1), (2, 0)):
        assert (others - expected)[row, start : LENGTHS[row]].abs().amax(1).min() > 1e-2


def test_logits_without_pictures_are_those_of_transformers(released):
    path, theirs = released
    tokens = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(herdkit.load(path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_transformers_shows_an_image_to_the_text_before_it(released):
    """Not so here: what comes before an image has the logits of text alone."""
    path, _ = released
    theirs = mllama.tiny()
    theirs.model.vision_model.intermediate_layers_indices = [0, 2]
    leaking, ours = their_logits(theirs, ROWS, IMAGES), our_logits(model := herdkit.load(path), ROWS, IMAGES)
    with torch.no_grad():
        alone = model(torch.tensor([ROWS[0][:2]]))
    torch.testing.assert_close(ours[0, :2], alone[0], rtol=0, atol=1e-5)
    assert (leaking - ours)[0, :2].abs().max() > 1e-2
    # Where nothing stands before the first image, both agree.
    assert_same(ours[2:], leaking[2:], LENGTHS[2:])


def test_transformers_taps_states_after_blocks(released):
    """The config means the states before them; given as it is, transformers takes those one block later."""
    path, theirs = released
    shifted = mllama.by_meta(mllama.tiny())
    shifted.model.vision_model.intermediate_layers_indices = [1, 3]
    ours = our_logits(herdkit.load(path), ROWS, IMAGES)
    assert_same(ours, their_logits(theirs, ROWS, IMAGES))
    assert (ours - their_logits(shifted, ROWS, IMAGES))[2, : LENGTHS[2]].abs().max() > 1e-2


def test_tables_that_tell_places_apart_are_kept_so(tmp_path):
    model = mllama.tiny()
    mllama.give_places(model)
    path = mllama.save_theirs(model, tmp_path / "theirs")
    ours = herdkit.load(path)
    assert ours.image.config.encoder["tile_tables"] == ours.image.encoder.config.tile_tables == "place"
    assert ours.image.encoder.tile_position_embedding.shape == (4, 4, 17, 32)
    assert_same(our_logits(ours, ROWS, IMAGES), their_logits(mllama.by_meta(model), ROWS, IMAGES))
    again = load_file(herdkit.save(ours, tmp_path / "again", "huggingface") / "model.safetensors")
    for name, tensor in load_file(path / "model.safetensors").items():
        assert torch.equal(again[name][:601], tensor[:601]), name


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200_000])
def test_what_is_saved_is_what_transformers_saved(released, tmp_path, max_shard_bytes):
    path, theirs = released
    ours = herdkit.load(path)
    saved = herdkit.save(ours, tmp_path / "saved", "huggingface", max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in saved.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) is (max_shard_bytes > 1e9)
    again, info = MllamaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        # Seven rows of the embedding stand for nothing; ours has no place for them.
        rows = 601 if name.endswith("embed_tokens.weight") else None
        assert torch.equal(state[name][:rows], tensor[:rows]), name
    expected, found = theirs.config.to_dict(), again.config.to_dict()
    for part in ("text_config", "vision_config"):
        for key in ("dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
            expected[part].pop(key, None), found[part].pop(key, None)
        assert expected[part] == {key: found[part][key] for key in expected[part]}
    assert found["image_token_index"] == mllama.IMAGE
    assert_same(our_logits(herdkit.load(saved), ROWS, IMAGES), our_logits(ours, ROWS, IMAGES), tolerance=0)


def test_transformers_answers_what_we_answer(released, tmp_path):
    """Its own processor, tokenizer, chat template and cached decoding, from the directory that we write."""
    path, _ = released
    saved = herdkit.save(herdkit.load(path), tmp_path / "saved", "huggingface")
    ours = herdkit.load(saved)
    theirs = mllama.by_meta(MllamaForConditionalGeneration.from_pretrained(saved))
    processor = AutoProcessor.from_pretrained(saved)
    images = [picture(60, 28, 1), picture(30, 90, 4)]
    question = {"type": "text", "text": " a red circle "}
    for pictures in (images[:1], images):
        content = [*({"type": "image", "image": image} for image in pictures), question]
        given = [{"role": "user", "content": content}]
        reply = ours.chat(given, max_new_tokens=8)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": "image"} for _ in pictures), question]}],
            add_generation_prompt=True,
        )
        inputs = processor(images=[pictures], text=[prompt], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == reply
        assert reply


def test_names_that_later_versions_have_in_memory_are_read(released, tmp_path):
    path, _ = released
    later = tmp_path / "later"
    later.mkdir()
    (later / "config.json").write_text((path / "config.json").read_text())
    renamed = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        whole = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
        renamed[whole if whole.startswith("lm_head") else f"model.{whole}"] = tensor
    save_file(renamed, later / "model.safetensors", metadata={"format": "pt"})
    expected, found = herdkit.load(path).state_dict(), herdkit.load(later).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_ports_and_our_own_directories(released, tmp_path, tokenizer):
    path, _ = released
    model = herdkit.load(path)
    found, (port,) = load_ports(path)
    # The image's own id lies beyond the vocabulary; here its placeholder has the id of Meta's tokenizer.
    assert found.special("<|image|>") == found.bos_id + 11
    assert found.vocab_size == mllama.VOCAB
    assert found.encode("a red circle") == tokenizer.encode("a red circle")
    assert (port.modality, port.prepare) == ("image", model.image.prepare)
    ours = herdkit.load(herdkit.save(model, tmp_path / "ours"))
    assert_same(our_logits(ours, ROWS, IMAGES), our_logits(model, ROWS, IMAGES), tolerance=0)
    assert herdkit.load(path, adapters=[]).modalities == []
    with pytest.raises(ModelDirectoryError, match=r"no adapter \['video'\]; it has \['image'\]"):
        herdkit.load(path, adapters=["video"])


def test_padding_may_be_left_out_of_a_loaded_model(released, tmp_path):
    """The two declared behaviours. They differ most where an image leaves tiles empty, and a little where it fills
    them all: as released, each tile is padded to a multiple of 8 tokens."""
    path, _ = released
    model = herdkit.load(path)
    as_released = our_logits(model, ROWS, IMAGES)
    model.image.change_encoder(padding="clean")
    clean = our_logits(model, ROWS, IMAGES)
    assert (clean - as_released)[2, : LENGTHS[2]].abs().max() > 1e-3
    again = herdkit.load(herdkit.save(model, tmp_path / "clean"))
    assert again.image.encoder.config.padding == again.image.config.encoder["padding"] == "clean"
    assert_same(our_logits(again, ROWS, IMAGES), clean, tolerance=0)
    with pytest.raises(AttributeError, match="padding"):
        model.image.encoder.config.padding = "released"
    with pytest.raises(ValueError, match=r"encoder\.padding must be 'released', not 'clean'"):
        herdkit.save(model, path.parent / "refused", "huggingface")
    assert not (path.parent / "refused").exists()


def video_for(model) -> VideoAdapter:
    torch.manual_seed(1)
    config = VideoAdapterConfig(
        frames=4, merge=2, tile_size=28, tile_tokens=17, max_tiles=4, n_image_layers=2, every=1, n_latents=3, dim=32,
        n_layers=1, n_heads=4, aggregator_ffn_dim=64, gate_init=0.5,
    )  # fmt: skip
    return VideoAdapter(config, model.text.config)


def test_video_is_grafted_onto_a_loaded_model(released, tmp_path):
    path, _ = released
    model = herdkit.load(path)
    images = our_logits(model, ROWS, IMAGES)
    model.attach(video_for(model))
    model.video.see_as_image(model.image)
    assert_same(our_logits(model, ROWS, IMAGES), images, tolerance=0)
    frames = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    inputs = model.video.prepare([herdkit.data.media.Clip(frames, torch.arange(4.0))])
    memory = model.video(inputs, image=model.image).memory
    assert memory.shape == (1, 6, 64)
    memory.sum().backward()
    assert model.video.aggregator.latents.grad.any()
    with pytest.raises(ValueError, match=r"huggingface\.mllama: it holds a language model with our image adapter"):
        herdkit.save(model, tmp_path / "refused", "huggingface")
    again = herdkit.load(herdkit.save(model, tmp_path / "both"))
    assert again.modalities == ["image", "video"]
    assert_same(our_logits(again, ROWS, IMAGES), images, tolerance=0)


def test_speech_is_grafted_onto_a_loaded_model(released, tmp_path):
    """What was trained on the language model alone hears the same beside the image adapter, which sees the same."""
    path, _ = released
    model = herdkit.load(path)
    images = our_logits(model, ROWS, IMAGES)
    torch.manual_seed(1)
    config = SpeechAdapterConfig(
        conformer=ConformerConfig(dim=24, n_layers=1, n_heads=2, ffn_dim=40), dim=32, ffn_dim=48, n_heads=4,
        output_scale=1.0,
    )  # fmt: skip
    alone = compose(herdkit.load(path, adapters=[]).text, model.tokenizer)
    alone.attach(SpeechAdapter(config, alone.text.config).eval())
    attach_adapters(model, herdkit.save(alone, tmp_path / "hearing"))
    assert model.modalities == ["image", "speech"]
    assert_same(our_logits(model, ROWS, IMAGES), images, tolerance=0)

    sounds = [0.3 * torch.randn(count, generator=torch.Generator().manual_seed(count)) for count in (9000, 20_000)]
    heard, other = ({"type": "audio", "audio": sound} for sound in sounds)
    seen, question = {"type": "image", "image": picture(60, 28, 1)}, {"type": "text", "text": " a red circle "}
    options = {"max_new_tokens": 8, "stop_ids": ()}

    def answer(model, *parts) -> str:
        return model.chat([{"role": "user", "content": list(parts)}], **options)

    assert answer(model, heard, question) == answer(alone, heard, question)
    answers = [answer(model, *parts, question) for parts in ((seen, heard), (seen, other), (heard, seen), (seen,))]
    assert len(set(answers)) == 4
    prompts, inputs, tokenizer = encode_prompts(model, [[{"role": "user", "content": [seen, heard, question]}]])
    row = prompts[0]
    with torch.no_grad():
        for _ in range(8):
            row.append(int(model(torch.tensor([row]), inputs)[0, -1].argmax()))
    assert tokenizer.decode(row[-8:]) == answers[0]

    again = herdkit.load(herdkit.save(model, tmp_path / "both"))
    assert again.modalities == ["image", "speech"]
    assert answer(again, seen, heard, question) == answers[0]
    assert_same(our_logits(again, ROWS, IMAGES), images, tolerance=0)
    with pytest.raises(ValueError, match=r"huggingface\.mllama: it holds a language model with our image adapter"):
        herdkit.save(model, tmp_path / "refused", "huggingface")


def test_its_image_adapter_joins_another_finetune_of_the_language_model(released):
    path, _ = released
    whole = herdkit.load(path)
    again = compose(herdkit.load(path, adapters=[]).text, whole.tokenizer)
    attach_adapters(again, path)
    assert_same(our_logits(again, ROWS, IMAGES), our_logits(whole, ROWS, IMAGES), tolerance=0)
    tuned = compose(herdkit.load(path, adapters=[]).text, whole.tokenizer)
    with torch.no_grad():
        tuned.text.output.weight.mul_(2)
    with pytest.raises(ModelDirectoryError, match="trained for another language model"):
        attach_adapters(tuned, path)
    attach_adapters(tuned, path, other_weights=True)
    assert_same(our_logits(tuned, ROWS, IMAGES), 2 * our_logits(whole, ROWS, IMAGES), tolerance=1e-5)
    with pytest.raises(ModelDirectoryError, match=r"no adapter \['video'\]; it has \['image'\]"):
        attach_adapters(tuned, path, ["video"], other_weights=True)


def test_faults_are_named(released, tmp_path):
    path, _ = released
    content = json.loads((path / "config.json").read_text())

    def changed(part: str, **values) -> str:
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        config = content | {part: content[part] | values} if part else content | values
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelDirectoryError) as error:
            herdkit.load(other)
        return str(error.value)

    assert "cross_attention_layers [1, 6] of 6 layers" in changed("text_config", cross_attention_layers=[1, 6])
    assert "cross_attention_layers [1, 2] of 6" in changed("text_config", cross_attention_layers=[1, 2])
    assert "text_config is missing or no object" in changed("", text_config=None)
    assert "vision_output_dim is 128" in changed("vision_config", vision_output_dim=128)
    assert "supported_aspect_ratios [[1, 1]]" in changed("vision_config", supported_aspect_ratios=[[1, 1]])
    assert "hidden_act 'relu'" in changed("vision_config", hidden_act="relu")
    assert "neither model.safetensors nor" in changed("", image_token_index=600)
    tensors = load_file(path / "model.safetensors")
    del tensors["vision_model.layernorm_pre.bias"]
    tensors["multi_modal_projector.weight"] = tensors["multi_modal_projector.weight"][:, :5].clone()
    tensors["surplus"] = torch.zeros(1)
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    message = changed("", image_token_index=600)
    assert "missing vision_model.layernorm_pre.bias" in message
    assert "multi_modal_projector.weight has shape (64, 5), expected (64, 96)" in message
    assert "surplus surplus" in message
    assert "image_token_index 700 is no row" in changed("", image_token_index=700)


def test_the_command_converts_both_ways(released, tmp_path):
    path, _ = released
    assert main(["convert", str(path), str(tmp_path / "ours"), "--layout", "herdkit"]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--layout", "huggingface"]) == 0
    saved, first = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(path / "model.safetensors")
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name][:601], tensor[:601]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("dim", "n_layers", "heads", "ffn", "n_cross", "side", "total"),
    [(4096, 32, 32, 14_336, 8, 448, 10.62e9), (8192, 80, 64, 28_672, 20, 560, 88.55e9)],
    ids=["11B", "90B"],
)
def test_the_released_sizes(dim, n_layers, heads, ffn, n_cross, side, total):
    """What the configs of the release give, without weights: parameters, and where the layers run."""
    flat = list(range(3, n_layers + n_cross, 5))
    text = {"hidden_size": dim, "num_hidden_layers": n_layers + n_cross, "num_attention_heads": heads}
    text |= {"num_key_value_heads": 8, "intermediate_size": ffn, "cross_attention_layers": flat, "vocab_size": 128_256}
    text |= {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 131_072}
    config, adapter = configs_from_hf({"text_config": text, "vision_config": {"image_size": side}}, {})
    assert adapter.places(n_layers) == placement(n_layers, n_cross) == list(range(3, n_layers, 4))
    adapter.encoder["tile_tables"] = "place"
    with torch.device("meta"):
        model = compose(Transformer(config), image=ImageAdapter(adapter, config))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=1e-3)
    assert model.image.encoder.config == preset(f"h14-{side}", padding="released")
