"""The supervised stage's batch and objective: what is said reaches encoder and soft tokens, and only what it should
reach."""

import io
from dataclasses import replace
from pathlib import Path

import herdkit
import pytest
import soundfile
import torch
from herdkit.adapters import Port
from herdkit.adapters.compose import ComposedModel
from herdkit.data.buckets import BucketConfig
from herdkit.data.shards import Sample, ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig, open_loader
from herdkit.speech import ConformerConfig, SpeechAdapter, SpeechAdapterConfig
from herdkit.speech.augment import WaveformAugmentConfig
from herdkit.speech.features import SpecAugmentConfig
from herdkit.speech.finetune import (
    SpeechCollator,
    SpeechObjective,
    SpeechRecipe,
    blank_token,
    new_adapter,
    surround_as_text,
)
from herdkit.speech.transcript_losses import TranscriptLosses
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.tokenizer import Tokenizer
from herdkit.train.config import RecipeError, load_recipe
from torch.nn import functional as F

RECIPE = Path(herdkit.__file__).parent / "speech/recipes/tiny_transcription.yaml"
DIALOG_OF_TWO = b"""{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "flac"},
{"type": "text", "text": "or"}, {"type": "audio", "audio": "wav"}]}, {"role": "assistant", "content": "go left"}]}"""
WORDS = ["red star", "go left", "what is two plus one"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"{words} . {words}" for words in WORDS] * 20, 540)


@pytest.fixture
def model(tokenizer) -> ComposedModel:
    torch.manual_seed(0)
    text = TransformerConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=48, vocab_size=tokenizer.vocab_size)
    adapter = SpeechAdapterConfig(
        conformer=ConformerConfig(dim=24, n_layers=1, n_heads=2, ffn_dim=40),
        dim=32, ffn_dim=48, n_heads=4, ctc_classes=257, output_scale=1.0,
    )  # fmt: skip
    composed = ComposedModel(Transformer(text), tokenizer)
    composed.attach(SpeechAdapter(adapter, text))
    composed.text.requires_grad_(False)
    return composed


def sample(i: int, seconds: float = 1.5, **changes) -> Sample:
    buffer = io.BytesIO()
    noise = 0.1 * torch.randn(int(16_000 * seconds), generator=torch.Generator().manual_seed(i))
    soundfile.write(buffer, noise.numpy(), 16_000, format="FLAC")
    dialog = b'{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "flac"}]},'
    dialog += b'{"role": "assistant", "content": "go left"}]}'
    members = {"flac": buffer.getvalue(), "txt": WORDS[i % 3].encode(), "json": dialog}
    return Sample(f"{i:03d}", "made.tar", {k: v for k, v in (members | changes).items() if v is not None})


def collate(model, samples, **options):
    options = {"spelled": True, "aligned": True} | options
    return SpeechCollator(model.tokenizer, [Port.of(model.adapters["speech"])], **options)(list(enumerate(samples)))


def objective(model, ctc=0.0, alignment=0.0, answer=1.0, **options) -> SpeechObjective:
    blank = model.tokenizer.encode(" .")[0]
    model.speech.losses = TranscriptLosses(ctc_weight=ctc, alignment_weight=alignment, blank=blank)
    return SpeechObjective(answer_weight=answer, **options)


def gradients(model, found: SpeechObjective, batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    count = sum((batch.labels >= 0).sum() for batch in batches)
    for batch in batches:
        (found(model, batch)[0] / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_transcript_that_does_not_fit_its_recording_is_a_bad_sample(model):
    ports = [Port.of(model.adapters["speech"])]
    long = sample(1)
    long.members["txt"] = b"green " * 30
    given = list(enumerate([sample(0), long]))
    SpeechCollator(model.tokenizer, ports, distilled=True)(given)
    for check, unit in (("spelled", "bytes"), ("aligned", "tokens")):
        collate = SpeechCollator(model.tokenizer, ports, **{check: True})
        collate(given[:1])
        with pytest.raises(ValueError, match=rf"made\.tar: sample 001: the transcript needs \d+ frames for its {unit}"):
            collate(given)


def test_a_batch_holds_the_words_as_tokens_and_as_bytes(model):
    batch = collate(model, [sample(0), sample(2)])
    for i, words in enumerate((WORDS[0], WORDS[2])):
        tensors = batch.inputs["speech"].tensors
        tokens, spelled = (
            tensors[name][i, : tensors[f"{name}_lengths"][i]].tolist() for name in ("tokens_said", "bytes_said")
        )
        assert tokens == model.tokenizer.encode(words)
        assert bytes(spelled).decode() == words
    with pytest.raises(ValueError, match=r"made\.tar: sample 001 has no member 'txt'"):
        collate(model, [sample(1, txt=None)])


def test_batches_by_length_stay_within_their_frames(model, tmp_path):
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        for i in range(40):
            one = sample(i, seconds=0.5 + (i * 7 % 40) / 20)
            writer.write(one.key, one.members)
    collate = SpeechCollator(model.tokenizer, [Port.of(model.adapters["speech"])])
    for bucket in (None, BucketConfig(budget=900, window=40)):
        data = DataConfig(sources=[SourceConfig(shards=str(tmp_path / "*.tar"), epochs=1)], bucket=bucket)
        frames, padded = 0, 0
        for batch in open_loader(data, collate, 8, lengths=collate.lengths):
            speech = batch.inputs["speech"].tensors
            assert bucket is None or speech["features"].shape[:2].numel() <= 900
            frames, padded = frames + speech["frames"].sum().item(), padded + speech["features"].shape[:2].numel()
        assert frames == sum(50 + 5 * (i * 7 % 40) for i in range(40))
        assert (frames > 0.9 * padded) == (bucket is not None)


def test_each_loss_reaches_what_it_trains_and_nothing_else(model):
    batch = collate(model, [sample(0), sample(1), sample(2, 2.0)])
    plain, spelled, aligned = (
        gradients(model, objective(model, *weights), [batch]) for weights in ((0, 0), (1, 0), (0, 1))
    )
    assert set(spelled) - set(plain) == {"speech.ctc.weight", "speech.ctc.bias"}
    assert set(aligned) == set(plain)
    changed = {name for name in plain if not torch.equal(plain[name], spelled[name])}
    assert changed
    assert all(name.startswith("speech.encoder.") for name in changed)
    changed = {name.split(".")[1] for name in plain if not torch.equal(plain[name], aligned[name])}
    assert {"encoder", "shorten", "attention", "output", "output_norm"} <= changed
    assert not changed & {"begin", "end"}


def test_without_the_answers_the_language_model_is_left_out(model, monkeypatch):
    batch = collate(model, [sample(0), sample(1)])
    both = objective(model, 0.5, 0.7)(model, batch)
    answers = objective(model)(model, batch)
    monkeypatch.setattr(Transformer, "hidden", lambda *_, **__: pytest.fail("the language model ran"))
    loss, count, metrics = objective(model, 0.5, 0.7, answer=0.0)(model, batch)
    torch.testing.assert_close(loss, both[0] - answers[0])
    assert count == both[1] > 0
    assert set(metrics) == {"ctc_loss", "alignment_loss"}


def test_split_batches_have_the_gradients_of_the_whole(model):
    samples = [sample(i, 1.2 + 0.3 * i) for i in range(3)]
    found = objective(model, 0.5, 0.7)
    whole = gradients(model, found, [collate(model, samples)])
    parts = gradients(model, found, [collate(model, samples[:1]), collate(model, samples[1:])])
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


def test_alignment_makes_soft_tokens_the_words_that_are_said(model):
    batch = collate(model, [sample(0), sample(1), sample(2)])
    found = objective(model, 1.0, 1.0)
    optimizer = torch.optim.AdamW(model.adapters["speech"].parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss, count, metrics = found(model, batch)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        aligned, n = metrics["alignment_loss"]
        losses.append((aligned / n).item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_new_adapter_starts_with_the_words_of_its_language_model(model):
    pause = blank_token(" .", model.tokenizer)
    recipe = load_recipe(RECIPE, SpeechRecipe, ["root=unused", 'encoder_weights=""'])
    assert recipe.adapter is not None
    adapter = new_adapter(recipe, recipe.adapter, model, model.text.tok_embeddings.weight, pause)
    words = model.text.tok_embeddings.weight
    assert adapter.config.pause == pause
    assert adapter.config.output_scale == pytest.approx(words.pow(2).mean().sqrt().item())
    soft = adapter.config.output_scale * 8 * F.normalize(words, dim=1)
    assert adapter.token_logits(soft, words).argmax(-1).tolist() == list(range(len(words)))


def test_an_utterance_starts_between_line_breaks_and_a_pause(model):
    pause = blank_token(" .", model.tokenizer)
    config = replace(model.adapters["speech"].config, word_temperature=0.1, pause=pause, output_scale=0.5)
    adapter = SpeechAdapter(config, model.text.config)
    surround_as_text(adapter, model.tokenizer, model.text.tok_embeddings.weight)
    words = model.text.tok_embeddings.weight
    bridged, lengths = adapter.bridge(torch.zeros(1, 6, 24), torch.tensor([6]))
    soft = adapter.soft_tokens(bridged, lengths, words)
    breaks = model.tokenizer.encode("\n\n")[-1]
    torch.testing.assert_close(soft[0, [0, -1]], words[[breaks, pause]])


def test_the_blank_has_to_be_one_token(model):
    with pytest.raises(ValueError, match=r"blank: 'red star' is \d tokens"):
        blank_token("red star", model.tokenizer)
    assert model.tokenizer.decode([blank_token(" .", model.tokenizer)]) == " ."


def test_distillation_is_the_divergence_from_the_answers_to_the_written_words(model):
    samples = [sample(i, 1.2 + 0.3 * i) for i in range(3)]
    batch = collate(model, samples, distilled=True)
    decoded = [model.tokenizer.decode(row.tolist()) for row in batch.written.tokens]
    for words, text in zip(WORDS, decoded, strict=True):
        assert f"user\n\n{words}assistant\n\n" in text
        assert "<|audio|>" not in text
    found = objective(model, answer=0.0, distil_weight=2.0, distil_temperature=3.0)
    loss, count, metrics = found(model, batch)
    heard = model(batch.tokens, batch.inputs)[batch.labels >= 0]
    read = model.text(batch.written.tokens)[batch.written.labels >= 0]
    p, q = ((logits / 3).softmax(-1) for logits in (read, heard))
    expected = (p * (p.log() - q.log())).sum() * 9
    torch.testing.assert_close(loss, 2 * expected, rtol=1e-4, atol=1e-5)
    assert count == (batch.labels >= 0).sum()
    assert set(metrics) == {"divergence"}
    together = gradients(model, found, [batch])
    assert set(together) == {name for name, p in model.named_parameters() if p.requires_grad and ".ctc." not in name}
    parts = gradients(
        model, found, [collate(model, samples[:1], distilled=True), collate(model, samples[1:], distilled=True)]
    )
    for name, gradient in together.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)


def test_distillation_brings_the_answers_together(model):
    batch = collate(model, [sample(0), sample(1)], distilled=True)
    found, losses = objective(model, answer=0.0, distil_weight=1.0), []
    optimizer = torch.optim.AdamW(model.adapters["speech"].parameters(), lr=3e-3)
    before = {name: weight.clone() for name, weight in model.text.named_parameters()}
    for _ in range(40):
        loss, _, _ = found(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(before[name], weight) for name, weight in model.text.named_parameters())


def test_recordings_are_augmented_by_their_place_in_the_run(model):
    config = WaveformAugmentConfig(speeds=(0.8, 1.0, 1.25), noise_probability=0.5)
    samples = [sample(i) for i in range(18)]
    plain = collate(model, samples)
    first, second = (collate(model, samples, augment=config, seed=3) for _ in range(2))
    other = collate(model, samples, augment=config, seed=4)
    frames = first.inputs["speech"].tensors["frames"]
    assert set(frames.tolist()) == {120, 150, 187}
    assert torch.equal(first.inputs["speech"].tensors["features"], second.inputs["speech"].tensors["features"])
    assert frames.tolist() != other.inputs["speech"].tensors["frames"].tolist()
    assert plain.inputs["speech"].tensors["frames"].tolist() == [150] * 18
    assert (first.tokens == model.tokenizer.special("<|audio|>")).sum(1).tolist() == [
        model.adapters["speech"].config.positions(160 * n) for n in frames.tolist()
    ]
    assert samples[0].members["flac"][:4] == b"fLaC", "stored samples stay as they are"
    measure = SpeechCollator(model.tokenizer, [Port.of(model.adapters["speech"])], augment=config)
    assert measure.lengths(samples[0]) == [188]


def test_masks_are_those_of_a_recording_whatever_it_shares_a_batch_with(model):
    ports, masks = [Port.of(model.adapters["speech"])], SpecAugmentConfig(time_share=0.2)
    samples = list(enumerate([sample(0), sample(1, 2.0), sample(2)]))
    collate = SpeechCollator(model.tokenizer, ports, masks=masks, seed=3)

    def features(collator, given):
        return collator(given).inputs["speech"].tensors["features"]

    together = features(collate, samples)
    plain = features(SpeechCollator(model.tokenizer, ports), samples)
    hidden = together != plain
    assert together[hidden].eq(0).all()
    assert all(0.05 < share < 0.9 for share in hidden.float().mean((1, 2)).tolist())
    assert not torch.equal(hidden[0], hidden[2])
    for i, one in enumerate(samples):
        alone = features(collate, [one])[0]
        assert torch.equal(together[i, : len(alone)], alone)
    other = features(SpeechCollator(model.tokenizer, ports, masks=masks, seed=4), samples)
    assert not torch.equal(other != plain, hidden)
    two = [(0, sample(0)), (1, sample(1, json=DIALOG_OF_TWO, wav=sample(2).members["flac"])), (2, sample(2))]
    found = features(collate, two)
    assert torch.equal(found[0], features(collate, two[:1])[0])
    assert torch.equal(found[3], features(collate, two[2:])[0])
    assert not torch.equal(found[1].eq(0), found[2].eq(0))


def test_masks_follow_the_recordings_that_are_in_a_batch(model):
    """Not those of a question without an answer, and one that two samples share once."""
    unanswered = b"""{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "flac"}]},
    {"role": "assistant", "content": "go left"}, {"role": "user", "content": [{"type": "audio", "audio": "wav"}]}]}"""
    masks, first, other = SpecAugmentConfig(), sample(0), sample(1)
    samples = [first, sample(2, json=unanswered, wav=other.members["flac"]), first, other]
    options = {"spelled": False, "aligned": False, "turns": "independent", "masks": masks}
    found = collate(model, samples, **options).inputs["speech"].tensors["features"]
    assert len(found) == 3
    for given, place in ((0, 0), (1, 1), (3, 2)):
        collator = SpeechCollator(model.tokenizer, [Port.of(model.adapters["speech"])], masks=masks)
        one = collator(
            [(given, replace(samples[given], members={**samples[given].members, "json": first.members["json"]}))]
        )
        assert torch.equal(found[place], one.inputs["speech"].tensors["features"][0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distil_weight=-1", "distil_weight must be at least 0"),
        ("distil_temperature=0", "distil_temperature must be positive"),
        ("waveform_augment={speeds: [3]}", "speeds must be from 0.5 to 2"),
    ],
)
def test_unusable_settings_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, SpeechRecipe, ["root=unused", override])
    with pytest.raises(RecipeError, match="distil_weight goes with a row for each sample"):
        load_recipe(RECIPE, SpeechRecipe, ["root=unused", "distil_weight=1", "data.packed=true"])


def test_without_such_losses_dialogs_need_no_transcripts_and_may_have_any_number_of_recordings(model):
    silent = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go left"}]}'
    samples = [
        sample(0, txt=None),
        sample(1, txt=None, json=DIALOG_OF_TWO, wav=sample(2).members["flac"]),
        sample(3, txt=None, flac=None, json=silent),
    ]
    batch = collate(model, samples, spelled=False, aligned=False)
    assert batch.inputs["speech"].placements.row.tolist() == [0, 1, 1]
    assert set(batch.inputs["speech"].tensors) == {"features", "frames"}
    assert batch.written is None
    assert isinstance(batch.to("cpu"), type(batch))
    loss, count, _ = objective(model)(model, batch)
    logits = model(batch.tokens, batch.inputs)[batch.labels >= 0]
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.labels[batch.labels >= 0], reduction="sum"))
    assert count == (batch.labels >= 0).sum()
    alone = collate(model, samples[2:], spelled=False, aligned=False)
    assert objective(model)(model, alone)[0] > 0
