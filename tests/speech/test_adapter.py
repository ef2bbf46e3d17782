import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch
from herdkit.adapters.compose import compose
from herdkit.adapters.contract import Adapter, ModalityBatch, Placements, Preparation
from herdkit.adapters.registry import adapter_class
from herdkit.data.media import MediaError
from herdkit.speech import (
    ConformerConfig,
    FeatureConfig,
    SpeechAdapter,
    SpeechAdapterConfig,
    SpeechPreparation,
    adapter_preset,
    ctc_loss,
    greedy_ctc,
)
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.model_directory import dataclass_from_dict
from omegaconf import OmegaConf
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

TEXT = TransformerConfig(dim=40, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=64, vocab_size=50)


def config(**changes) -> SpeechAdapterConfig:
    conformer = ConformerConfig(dim=24, n_layers=2, n_heads=2, ffn_dim=40)
    return SpeechAdapterConfig(**{"conformer": conformer, "dim": 32, "ffn_dim": 48, "n_heads": 4} | changes)


def adapter(dtype=torch.float32, seed=0, words=None, **changes) -> SpeechAdapter:
    torch.manual_seed(seed)
    one = SpeechAdapter(config(**changes), TEXT).to(dtype)
    if words is not None:
        one.start_words(words)
    return one


def waveforms(*samples: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [0.1 * torch.randn(count).cumsum(0).sin() for count in samples]


def cast(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"features": batch["features"].to(dtype), "frames": batch["frames"]}


def test_mixtures_are_the_words_that_the_soft_tokens_are_most_like():
    torch.manual_seed(3)
    text = Transformer(TEXT)
    words = text.tok_embeddings.weight
    plain, mixing = adapter(output_scale=0.3), adapter(output_scale=0.3, word_temperature=0.01, words=words)
    found = mixing.load_state_dict(plain.state_dict(), strict=False)
    assert found.missing_keys == ["words.weight", "words.bias"]
    assert plain.requires == mixing.requires == ("embeddings",)
    with pytest.raises(ValueError, match="give its token embeddings"):
        mixing(mixing.prepare(waveforms(9000)))
    batch = plain.prepare(waveforms(9000, 16000))
    bridged, lengths = plain.bridge(*plain.encode(batch["features"], batch["frames"]))
    given = mixing(batch, embeddings=text.tok_embeddings).soft_tokens
    torch.testing.assert_close(mixing.token_logits(bridged, words), plain.token_logits(bridged, words))
    for n, length in enumerate(lengths.tolist()):
        said = F.cosine_similarity(bridged[n, 1 : length - 1, None], words, dim=-1).argmax(-1)
        assert len(set(said.tolist())) > 1
        torch.testing.assert_close(given[n, 1 : length - 1], words[said], rtol=0, atol=0.3)
        for kept in ([0, length - 1], slice(length, None)):
            torch.testing.assert_close(given[n, kept], bridged[n, kept], rtol=0, atol=0)
    even = SpeechAdapter.soft_tokens(adapter(word_temperature=1e6, words=words), bridged, lengths, words)
    torch.testing.assert_close(even[0, 1], words.mean(0), rtol=0, atol=1e-4)


def test_silence_and_what_is_said_twice_come_behind_the_words():
    torch.manual_seed(3)
    words = torch.randn(50, TEXT.dim)
    pause = 7
    heard = [[7, 7, 4, 4, 7, 4, 9, 7, 2, 2], [5, 5, 5, 7, 6]]
    lengths = torch.tensor([len(row) + 2 for row in heard])
    bridged = torch.randn(2, 12, TEXT.dim)
    for n, row in enumerate(heard):
        bridged[n, 1 : 1 + len(row)] = 8 * F.normalize(words[row], dim=1)
    bridged.requires_grad_(True)
    one = adapter(output_scale=1.0, word_temperature=0.01, pause=pause, words=words)
    given = one.soft_tokens(bridged, lengths, words)
    for n, said in enumerate(([4, 4, 9, 2], [5, 6])):
        length = int(lengths[n])
        expected = said + [pause] * (length - 2 - len(said))
        torch.testing.assert_close(given[n, 1 : length - 1], words[expected], rtol=0, atol=1e-3)
        for kept in ([0, length - 1], slice(length, None)):
            torch.testing.assert_close(given[n, kept], bridged[n, kept], rtol=0, atol=0)
    alone = one.soft_tokens(bridged[1:, :7], lengths[1:], words)
    torch.testing.assert_close(alone[0], given[1, :7])
    soft = adapter(output_scale=1.0, word_temperature=2.0, pause=pause, words=words).soft_tokens(
        bridged, lengths, words
    )
    soft[0, 4].sum().backward()
    assert bridged.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [9], "the last word, where it is said first"
    with pytest.raises(ValueError, match="pause needs a word_temperature"):
        config(pause=3)


def test_the_head_decides_which_word_a_soft_token_is():
    torch.manual_seed(3)
    words = torch.randn(50, TEXT.dim)
    one = adapter(output_scale=1.0, word_temperature=0.01, words=words)
    with torch.no_grad():
        one.words.bias[11] = 100
    bridged, lengths = torch.randn(1, 4, TEXT.dim), torch.tensor([4])
    torch.testing.assert_close(one.soft_tokens(bridged, lengths, words)[0, 1:3], words[[11, 11]])
    one.token_logits(bridged, words)[..., 5].sum().backward()
    assert one.words.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [5]


def test_a_model_hands_its_words_to_the_adapter_that_mixes_them():
    model = compose(text=Transformer(TEXT), speech=adapter(word_temperature=1.0))
    batch = model.speech.prepare(waveforms(9000))
    S = model.speech(batch, embeddings=model.text.tok_embeddings).soft_tokens.shape[1]
    one = torch.zeros(1, dtype=torch.int64)
    where = Placements(row=one, start=one, length=one + S, end=one + S, input=one)
    logits = model(torch.zeros(1, S, dtype=torch.int64), {"speech": ModalityBatch(batch, where)})
    expected = model.text(embeddings=model.speech(batch, embeddings=model.text.tok_embeddings).soft_tokens)
    torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="word_temperature must be positive, not 0"):
        config(word_temperature=0.0)


def test_it_keeps_the_contract():
    model = adapter()
    assert isinstance(model, Adapter)
    assert isinstance(model.prepare, Preparation)
    assert (model.modality, model.part, model.placeholder) == ("speech", "audio", "<|audio|>")
    assert model.config_class is SpeechAdapterConfig
    assert adapter_class("speech") is SpeechAdapter
    assert model.interleaved() == {}
    copy = pickle.loads(pickle.dumps(model.prepare))
    items = waveforms(5000)
    assert torch.equal(copy(items)["features"], model.prepare(items)["features"])
    contribution = model(model.prepare(items))
    assert contribution.memory is None
    assert contribution.soft_tokens.shape == (1, model.prepare.positions(items[0]), 40)


def test_the_papers_adapter_has_about_a_hundred_million_parameters():
    text = TransformerConfig(dim=4096, n_layers=1, n_heads=8, n_kv_heads=8, ffn_dim=8, vocab_size=8)
    with torch.device("meta"):
        model = SpeechAdapter(adapter_preset("1b"), text)
    count = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("encoder."))
    assert count == pytest.approx(102.3e6, rel=1e-3)
    assert adapter_preset("1b").positions(960_000) == 750 + 2, "12.5 soft tokens a second"


def test_positions_are_the_soft_tokens_of_every_number_of_samples():
    model = adapter()
    counts = sorted({*range(400, 50_000, 1237), *range(400, 3000, 83), 1279, 1280, 1281, 49_999, 50_000})
    prepared = model.prepare([torch.zeros(count) for count in counts])
    assert prepared["frames"].tolist() == [count // 160 for count in counts]
    prepared["features"] = torch.randn_like(prepared["features"])
    soft = model(prepared).soft_tokens
    positions = torch.tensor([model.prepare.positions(torch.zeros(count)) for count in counts])
    assert soft.shape[1] == positions.max()
    real = soft.abs().sum(dim=-1) > 0
    assert torch.equal(real, torch.arange(soft.shape[1]) < positions[:, None])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_alone_equals_batched_from_waveform_to_soft_tokens(dtype, tolerance):
    model = adapter(dtype, output_scale=1.0)
    items = waveforms(9000, 400, 40_000, 17_321, 640)
    batch = cast(model.prepare(items), dtype)
    together = model(batch).soft_tokens
    padding = torch.arange(250) >= batch["frames"][:, None]
    dirty = {**batch, "features": batch["features"].masked_fill(padding[..., None], float("nan"))}
    assert torch.equal(model(dirty).soft_tokens, together)
    for n, item in enumerate(items):
        alone = model(cast(model.prepare([item]), dtype)).soft_tokens
        assert alone.shape[1] == model.prepare.positions(item)
        torch.testing.assert_close(together[n, : alone.shape[1]], alone[0], atol=tolerance, rtol=0)
    order = [3, 1, 4, 0, 2]
    permuted = model(cast(model.prepare([items[n] for n in order]), dtype)).soft_tokens
    torch.testing.assert_close(permuted, together[order], atol=tolerance, rtol=0)


def test_gradients_are_those_of_the_utterances_alone():
    model, items = adapter(torch.float64), waveforms(3000, 12_000, 700)
    model(cast(model.prepare(items), torch.float64)).soft_tokens.square().sum().backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    for item in items:
        model(cast(model.prepare([item]), torch.float64)).soft_tokens.square().sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(together[name], weight.grad, atol=1e-12, rtol=1e-8, msg=name)


def test_the_bridge_equals_a_convolution_and_a_transformers_llama_layer():
    model = adapter(conv_kernel=3, n_heads=4)
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(llama, 0)

    def halves(weight):  # lanes paired (2i, 2i + 1) to lanes paired (i, i + Dh/2)
        return weight.unflatten(0, (4, -1, 2)).transpose(1, 2).flatten(0, 2)

    with torch.no_grad():
        for norm in (model.attention_norm, model.ffn_norm, model.output_norm):
            norm.weight.normal_(1, 0.2)
        q, k, v = model.attention.qkv.weight.chunk(3)
        layer.self_attn.q_proj.weight.copy_(halves(q))
        layer.self_attn.k_proj.weight.copy_(halves(k))
        layer.self_attn.v_proj.weight.copy_(v)
        layer.self_attn.o_proj.weight.copy_(model.attention.out.weight)
        layer.mlp.gate_proj.weight.copy_(model.feed_forward.w1.weight)
        layer.mlp.up_proj.weight.copy_(model.feed_forward.w3.weight)
        layer.mlp.down_proj.weight.copy_(model.feed_forward.w2.weight)
        layer.input_layernorm.weight.copy_(model.attention_norm.weight)
        layer.post_attention_layernorm.weight.copy_(model.ffn_norm.weight)
    lengths = torch.tensor([11, 4, 7])
    encoded = torch.randn(3, 11, 24) * (torch.arange(11) < lengths[:, None])[..., None]
    soft, counts = model.bridge(encoded, lengths)
    assert counts.tolist() == [8, 4, 6]
    for n in range(3):
        padded = F.pad(encoded[n, : lengths[n]], (0, 0, 1, 1 + int(lengths[n]) % 2))
        frames = torch.stack(
            [
                sum(padded[2 * t + k] @ model.shorten.weight[:, :, k].T for k in range(3)) + model.shorten.bias
                for t in range(-(-int(lengths[n]) // 2))
            ]
        )[None]
        T = frames.shape[1]
        turn = LlamaRotaryEmbedding(llama)(frames, torch.arange(T)[None])
        out = layer(frames, attention_mask=torch.zeros(1, 1, T, T), position_embeddings=turn)
        out = (out if isinstance(out, torch.Tensor) else out[0]) @ model.output.weight.T
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.output_norm.weight * 0.02
        torch.testing.assert_close(soft[n, 1 : T + 1], out[0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(soft[n, 0], model.begin * 0.02)
        torch.testing.assert_close(soft[n, T + 1], model.end * 0.02)
        assert not soft[n, T + 2 :].any()


@pytest.mark.parametrize("scale", [0.02, 0.7])
def test_soft_tokens_start_at_the_size_of_token_embeddings(scale):
    model = adapter(output_scale=scale)
    soft = model(model.prepare(waveforms(16_000))).soft_tokens[0]
    sizes = soft.square().mean(-1).sqrt()
    torch.testing.assert_close(sizes[1:-1], torch.full_like(sizes[1:-1], scale), rtol=1e-3, atol=0)
    assert sizes[0].item() == pytest.approx(scale, rel=0.5)
    assert sizes[-1].item() == pytest.approx(scale, rel=0.5)


def test_ctc_trains_the_encoder_alone():
    model = adapter(ctc_classes=5)
    batch = model.prepare(waveforms(16_000, 8000))
    encoded, lengths = model.encode(batch["features"], batch["frames"])
    targets, target_lengths = torch.tensor([[1, 2, 3, 3], [4, 1, 0, 0]]), torch.tensor([4, 2])
    loss, count = model.ctc_loss(encoded, lengths, targets, target_lengths)
    expected, _ = ctc_loss(model.ctc(encoded), lengths, targets, target_lengths)
    assert (loss, count) == (expected, 6)
    assert model.greedy_ctc(encoded, lengths) == greedy_ctc(model.ctc(encoded), lengths)
    loss.backward()
    reached = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {"encoder", "ctc"}


def test_a_model_without_ctc_head_says_so():
    with pytest.raises(ValueError, match="ctc_classes"):
        adapter().ctc_loss(torch.zeros(1, 4, 24), *(torch.tensor([1]),) * 3)


def test_ctc_learns_to_tell_tones_in_order():
    model = adapter(ctc_classes=3, conformer=ConformerConfig(dim=24, n_layers=1, n_heads=2, ffn_dim=40))
    time = torch.arange(1600) / 16_000
    sounds = [torch.zeros(1600), torch.sin(2 * torch.pi * 400 * time), torch.sin(2 * torch.pi * 2500 * time)]
    spoken = [[1, 2], [2, 1], [1, 2, 1], [2, 2, 1], [1], [2], [1, 1], [2, 1, 2]]
    noise = torch.Generator().manual_seed(0)
    items = [torch.cat([part for token in words for part in (sounds[token], sounds[0])]) for words in spoken]
    items = [item + 0.01 * torch.randn(item.shape, generator=noise) for item in items]
    batch, lengths = model.prepare(items), torch.tensor([len(words) for words in spoken])
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(words) for words in spoken], batch_first=True)
    assert model.greedy_ctc(*model.encode(batch["features"], batch["frames"])) != spoken
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        encoded, frames = model.encode(batch["features"], batch["frames"])
        loss, count = model.ctc_loss(encoded, frames, targets, lengths)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert model.greedy_ctc(*model.encode(batch["features"], batch["frames"])) == spoken


def test_bfloat16_autocast_gives_finite_tokens_and_gradients():
    model = adapter(ctc_classes=4)
    batch = model.prepare(waveforms(9000, 2000))
    expected = model(batch).soft_tokens
    with torch.autocast("cpu", torch.bfloat16):
        soft = model(batch).soft_tokens
    assert (soft.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    soft.float().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_load_takes_files_bytes_tensors_and_arrays(tmp_path):
    prepare = SpeechPreparation(config())
    samples = waveforms(8000)[0].numpy()
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", np.repeat(samples[:, None], 2, axis=1), 8000)
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), (tmp_path / "a.wav").read_bytes(), samples):
        torch.testing.assert_close(prepare.load(source), torch.tensor(samples))
    assert prepare.load(torch.zeros(500, dtype=torch.float64)).dtype == torch.float32
    assert prepare.load(tmp_path / "b.wav").shape == (16_000,)
    assert prepare.positions(prepare.load(tmp_path / "b.wav")) == 15


def test_load_names_the_file_and_the_reason(tmp_path):
    prepare = SpeechPreparation(config())
    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 61), 8000)
    soundfile.write(tmp_path / "short.wav", np.zeros(399), 16_000)
    with pytest.raises(MediaError, match=r"long\.wav: 61\.0 s of audio is more than max_seconds \(60\)"):
        prepare.load(tmp_path / "long.wav")
    with pytest.raises(MediaError, match=r"short\.wav: 399 samples"):
        prepare.load(tmp_path / "short.wav")
    with pytest.raises(MediaError, match=r"missing\.wav"):
        prepare.load(tmp_path / "missing.wav")
    with pytest.raises(MediaError, match=r"shape \(2, 8000\)"):
        prepare.load(torch.zeros(2, 8000))
    with pytest.raises(MediaError, match=r"torch\.int16"):
        prepare.load(np.zeros(8000, dtype=np.int16))
    with pytest.raises(ValueError, match="less than a window"):
        prepare.positions(torch.zeros(100))
    assert prepare.positions(torch.zeros(960_000)) == 752
    with pytest.raises(ValueError, match="max_seconds"):
        prepare.positions(torch.zeros(960_001))


def test_config_passes_through_omegaconf_and_json():
    made = config(ctc_classes=30, features=FeatureConfig(normalize="none"))
    assert OmegaConf.to_object(OmegaConf.structured(made)) == made
    read = json.loads(json.dumps(asdict(made)))
    assert dataclass_from_dict(SpeechAdapterConfig, read) == made
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SpeechAdapterConfig), read)) == made


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n_heads": 32}, "dim"),
        ({"conv_kernel": 4}, "conv_kernel"),
        ({"output_scale": 0.0}, "output_scale"),
        ({"ctc_classes": 1}, "ctc_classes"),
        ({"features": FeatureConfig(n_mels=40)}, "n_mels"),
        ({"conv_stride": 0}, "conv_stride"),
        ({"max_seconds": 0.0}, "max_seconds"),
    ],
)
def test_config_errors_name_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        config(**changes)
