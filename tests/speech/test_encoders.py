"""Encoders of others behind the adapter: what they give is what their own library gives, for each utterance as if it
were alone."""

import copy
import json
import pickle
from dataclasses import asdict, dataclass

import pytest
import torch
import transformers
from herdkit.adapters.compose import compose
from herdkit.adapters.model_directory import load, save
from herdkit.speech import FeatureConfig, SpeechAdapter, SpeechAdapterConfig, log_mel, pad_features
from herdkit.speech.encoders import EncoderSpec, encoder_spec, load_encoder, register_speech_encoder
from herdkit.speech.finetune import SpeechRecipe
from herdkit.speech.foreign_features import kaldi_features, whisper_features
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.model_directory import dataclass_from_dict, save_part
from herdkit.text.tokenizer import Tokenizer
from herdkit.train.config import load_recipe
from syllables import RATE, syllables
from torch import nn
from transformers import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

TEXT = TransformerConfig(dim=24, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, vocab_size=520, max_seq_len=2000)
SIZES = {
    "torchaudio": {"width": 16, "n_heads": 2, "ffn_dim": 24, "n_layers": 2, "conv_kernel": 7},
    "wav2vec2-bert": {
        "config": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
            "position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 5,
        }
    },
    "whisper": {"config": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}},
}  # fmt: skip
LENGTHS = (16_000, 9_123, 8_000, 31_999, 640)


def spec(kind: str) -> EncoderSpec:
    return encoder_spec({"type": kind, **SIZES[kind]})


def adapter(kind: str) -> SpeechAdapter:
    torch.manual_seed(0)
    config = SpeechAdapterConfig(
        encoder={"type": kind, **SIZES[kind]}, dim=16, ffn_dim=24, n_heads=2, max_seconds=30, ctc_classes=5,
        output_scale=1.0,
    )  # fmt: skip
    return SpeechAdapter(config, TEXT).eval()


def recordings() -> list[torch.Tensor]:
    return [syllables(samples / RATE, i)[:samples] for i, samples in enumerate(LENGTHS)]


@pytest.mark.parametrize("kind", list(SIZES))
def test_neither_padding_nor_neighbours_change_an_utterance(kind):
    model = adapter(kind)
    batch = model.prepare(recordings())
    with torch.no_grad():
        together, counts = model.bridge(*model.encode(batch["features"], batch["frames"]))
        valid = torch.arange(batch["features"].shape[1]) < batch["frames"][:, None]
        noisy = torch.where(valid[..., None], batch["features"], 50 * torch.randn_like(batch["features"]))
        dirty, _ = model.bridge(*model.encode(noisy, batch["frames"]))
        torch.testing.assert_close(dirty, together, atol=1e-6, rtol=0)
        for n, recording in enumerate(recordings()):
            one = model.prepare([recording])
            alone, length = model.bridge(*model.encode(one["features"], one["frames"]))
            assert length[0] == counts[n] == model.prepare.positions(recording) == alone.shape[1]
            torch.testing.assert_close(together[n, : counts[n]], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(SIZES))
def test_gradients_reach_the_encoder_and_leave_padding_out(kind):
    model = adapter(kind)
    batch = model.prepare(recordings()[:3])
    features = batch["features"].requires_grad_()
    encoded, lengths = model.encode(features, batch["frames"])
    assert encoded.shape == (3, int(lengths.max()), 16)
    assert not encoded.detach()[torch.arange(encoded.shape[1]) >= lengths[:, None]].any()
    encoded.square().sum().backward()
    padding = torch.arange(features.shape[1]) >= batch["frames"][:, None]
    assert not features.grad[padding].any()
    names = [name for name, weight in model.encoder.named_parameters() if weight.grad is None]
    assert all("masked_spec_embed" in name or "embed_positions" in name for name in names), names


def test_features_are_those_of_whispers_extractor():
    extractor = WhisperFeatureExtractor(feature_size=80)
    model = spec("whisper").build().eval()
    for recording in recordings()[:4]:
        theirs = torch.from_numpy(
            extractor(recording.numpy(), sampling_rate=RATE, return_tensors="np").input_features[0]
        ).T
        ours = log_mel(recording, whisper_features())
        torch.testing.assert_close(ours, theirs[: len(ours)], atol=1e-4, rtol=0)
        seen = []
        handle = model.model.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            encoded, _ = model(ours[None], torch.tensor([len(ours)]))
            handle.remove()
            expected = model.model(theirs.T[None]).last_hidden_state
        torch.testing.assert_close(seen[0][0].T, theirs, atol=1e-4, rtol=0)
        torch.testing.assert_close(encoded[0], expected[0, : encoded.shape[1]], atol=1e-4, rtol=0)


def test_thirty_seconds_fill_whispers_positions_and_more_is_refused():
    made = spec("whisper")
    frames = whisper_features().frames(30 * RATE)
    assert made.length(frames) == 1500
    config = SpeechAdapterConfig(encoder={"type": "whisper", **SIZES["whisper"]}, max_seconds=60)
    with pytest.raises(ValueError, match=r"takes 3000 \(30 s\); set max_seconds"):
        config.positions(31 * RATE)


def test_features_are_those_of_wav2vec2_berts_extractor():
    extractor = SeamlessM4TFeatureExtractor(padding_value=1)
    model = spec("wav2vec2-bert").build().eval()
    rows = recordings()[:4]
    given = extractor([row.numpy() for row in rows], sampling_rate=RATE, return_tensors="pt")
    ours = pad_features([log_mel(row, kaldi_features()) for row in rows])
    with torch.no_grad():
        encoded, lengths = model(ours["features"], ours["frames"])
        expected = model.model(given.input_features, attention_mask=given.attention_mask).last_hidden_state
    assert lengths.tolist() == given.attention_mask.sum(1).tolist()
    for n, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoded[n, :length], expected[n, :length], atol=2e-3, rtol=0)


def test_torchaudios_conformer_is_what_it_gives_alone():
    model = spec("torchaudio").build().eval()
    features = torch.randn(1, 80, 80)
    with torch.no_grad():
        encoded, lengths = model(features, torch.tensor([80]))
        expected, _ = model.model(model.input(features.view(1, 20, 320)), lengths)
    torch.testing.assert_close(encoded, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_composed_model_is_saved_and_loaded(kind, tmp_path):
    tokenizer = Tokenizer.train(["go left and right"] * 20, 520)
    model = compose(text=Transformer(TEXT), tokenizer=tokenizer, speech=adapter(kind)).eval()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.speech.config == model.speech.config
    assert pickle.loads(pickle.dumps(model.speech.prepare)).positions(recordings()[0]) > 2
    batch = model.speech.prepare(recordings()[:2])
    with torch.no_grad():
        torch.testing.assert_close(again.speech(batch).soft_tokens, model.speech(batch).soft_tokens)


def test_pre_trained_weights_come_from_a_directory_or_a_file(tmp_path):
    one, other = spec("wav2vec2-bert").build(), spec("wav2vec2-bert").build()
    one.model.save_pretrained(tmp_path / "hf")
    load_encoder(other, tmp_path / "hf")
    torch.testing.assert_close(other.state_dict(), one.state_dict())
    smaller = copy.deepcopy(SIZES["wav2vec2-bert"])
    smaller["config"]["intermediate_size"] = 16
    with pytest.raises(ValueError, match=r"its configuration is not that of the encoder: .*intermediate"):
        load_encoder(encoder_spec({"type": "wav2vec2-bert", **smaller}).build(), tmp_path / "hf")
    other = copy.deepcopy(SIZES["wav2vec2-bert"])
    other["config"]["hidden_act"] = "relu"
    with pytest.raises(ValueError, match=r"hidden_act is 'swish' there and 'relu' in encoder\.config"):
        load_encoder(encoder_spec({"type": "wav2vec2-bert", **other}).build(), tmp_path / "hf")
    ours = spec("torchaudio").build()
    save_part(ours, tmp_path / "encoder.safetensors")
    load_encoder(ours, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="takes a safetensors file"):
        load_encoder(ours, tmp_path / "hf")


@pytest.mark.parametrize("name", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_the_encoder_of_a_whole_whisper_is_loaded(tmp_path, name):
    encoder = spec("whisper").build()
    configuration = copy.deepcopy(encoder.model.config)
    configuration.update({"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 60})
    configuration.update({"pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 0})
    whole = getattr(transformers, name)(configuration)
    whole.save_pretrained(tmp_path / "whisper")
    load_encoder(encoder, tmp_path / "whisper")
    torch.testing.assert_close(encoder.model.state_dict(), whole.get_encoder().state_dict())


@dataclass
class MeanSpec(EncoderSpec):
    """A user's encoder: the mean of every ten frames, through one matrix."""

    width: int
    stride: int = 10

    @property
    def features(self) -> FeatureConfig:
        return FeatureConfig(n_mels=8)

    def length(self, frames: int) -> int:
        return -(-frames // 10)

    def build(self) -> nn.Module:
        return MeanEncoder(self.width)


class MeanEncoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.output = nn.Linear(80, width)

    def forward(self, features, frames):
        from herdkit.speech.conformer import stack_frames, valid_frames

        stacked, lengths = stack_frames(features, frames, 10)
        return self.output(stacked) * valid_frames(lengths, stacked.shape[1])[..., None], lengths


def test_a_users_encoder_joins_in():
    register_speech_encoder("mean", MeanSpec)
    config = SpeechAdapterConfig(encoder={"type": "mean", "width": 12}, dim=16, ffn_dim=24, n_heads=2)
    model = SpeechAdapter(config, TEXT).eval()
    assert config.features.n_mels == 8
    assert config.frame_seconds == pytest.approx(0.1)
    soft = model(model.prepare([torch.randn(16_000)])).soft_tokens
    assert soft.shape == (1, config.positions(16_000), 24)
    register_speech_encoder("wrong", lambda: "no spec")
    with pytest.raises(ValueError, match="described by a str"):
        encoder_spec({"type": "wrong"})


def test_recipes_name_encoders(tmp_path):
    (tmp_path / "r.yaml").write_text("""
stage: speech.finetune
init: nowhere
adapter:
  encoder: {type: whisper, config: {d_model: 384, encoder_layers: 4, encoder_attention_heads: 6}}
  max_seconds: 30
optimizer: {lr: 1.0e-3}
schedule: {kind: constant}
trainer: {steps: 1, batch_size: 1}
""")
    recipe = load_recipe(tmp_path / "r.yaml", SpeechRecipe)
    assert recipe.adapter.features.kind == "whisper"
    assert recipe.adapter.encoder_spec.width == 384
    assert asdict(recipe.adapter)["conformer"] is None
    again = dataclass_from_dict(SpeechAdapterConfig, json.loads(json.dumps(asdict(recipe.adapter))))
    assert again == recipe.adapter


def test_features_beside_an_encoder_that_brings_its_own_are_refused():
    given = {"encoder": {"type": "whisper", **SIZES["whisper"]}, "max_seconds": 30}
    with pytest.raises(ValueError, match="features: the encoder brings its own"):
        SpeechAdapterConfig(**given, features=FeatureConfig(n_mels=40))
    own = {"type": "torchaudio", **SIZES["torchaudio"], "features": {"n_mels": 40}}
    assert SpeechAdapterConfig(encoder=own).features == FeatureConfig(n_mels=40)


def test_lengths_are_known_without_building_configurations(monkeypatch):
    prepare = adapter("whisper").prepare
    wanted = [prepare.positions(recording) for recording in recordings()]
    monkeypatch.setattr(transformers.WhisperConfig, "__init__", None)
    assert [prepare.positions(recording) for recording in recordings()] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "whispr"}, "encoder.type is 'whispr'; did you mean 'whisper'"),
        ({"type": "whisper", "config": {"d_modle": 3}}, "encoder.config.d_modle: WhisperConfig has no such field"),
        ({"type": "torchaudio", "widht": 3}, "unknown key 'encoder.widht'"),
    ],
)
def test_unknown_encoders_and_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpeechAdapterConfig(encoder=options)
    with pytest.raises(ValueError, match="not both"):
        SpeechAdapterConfig()
