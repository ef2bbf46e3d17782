import io
import math
from pathlib import Path

import herdkit
import numpy as np
import pytest
import soundfile
import torch
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import open_loader
from herdkit.speech import (
    BestRQ,
    BestRQConfig,
    Conformer,
    ConformerConfig,
    FeatureConfig,
    bestrq,
    log_mel,
    pad_features,
    pretrain,
    random_crop,
)
from herdkit.speech.bestrq import expected_codes, fully_hidden, span_mask
from herdkit.speech.conformer import stack_frames
from herdkit.speech.pretrain import AudioCollator, BestRQObjective, BestRQRecipe, CodeUsageError, pretrain_encoder
from herdkit.train.config import load_recipe

FRAMES = torch.tensor([90, 33, 61, 2])
TINY_RECIPE = Path(herdkit.__file__).parent / "speech/recipes/tiny_bestrq.yaml"
TINY = {"n_codebooks": 3, "n_codes": 17, "code_dim": 5}


def tiny(seed=0, dtype=torch.float32, **changes) -> BestRQ:
    torch.manual_seed(seed)
    encoder = Conformer(ConformerConfig(n_mels=12, dim=24, n_layers=2, n_heads=2, ffn_dim=40))
    return BestRQ(encoder, BestRQConfig(**TINY | changes)).to(dtype)


def features(seed=0) -> torch.Tensor:
    return torch.randn(4, 90, 12, generator=torch.Generator().manual_seed(seed))


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_codes_are_nearest_by_cosine_similarity():
    model = tiny()
    frames = torch.randn(20, 48)
    got = model.quantise(frames)
    assert got.shape == (20, 3)
    for m in range(20):
        for q in range(3):
            vector = frames[m].double().numpy() @ model.projections[q].double().numpy()
            cosines = [
                np.dot(vector, code) / np.linalg.norm(vector) / np.linalg.norm(code)
                for code in model.codes[q].double().numpy()
            ]
            assert got[m, q] == int(np.argmax(cosines))
    assert torch.equal(model.quantise(7.5 * frames), got), "length does not matter"


def test_targets_do_not_depend_on_batch_padding_order_or_memory(monkeypatch):
    model = tiny(n_codes=512, n_codebooks=8)
    x = features()
    stacked, lengths = stack_frames(x, FRAMES, 4)
    together = model.quantise(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
    dirty = x.masked_fill((torch.arange(90) >= FRAMES[:, None])[..., None], float("nan"))
    for n, (frames, length) in enumerate(zip(FRAMES, lengths, strict=True)):
        alone, _ = stack_frames(dirty[n : n + 1, :frames], FRAMES[n : n + 1], 4)
        padded, _ = stack_frames(dirty[n : n + 1], FRAMES[n : n + 1], 4)
        assert torch.equal(model.quantise(alone[0]), together[n, :length])
        assert torch.equal(model.quantise(padded[0, :length]), together[n, :length])
        for t in range(0, int(length), 7):
            assert torch.equal(model.quantise(stacked[n, t : t + 1])[0], together[n, t])
    order = torch.randperm(4)
    assert torch.equal(model.quantise(stacked[order].flatten(0, 1)).unflatten(0, stacked.shape[:2]), together[order])
    monkeypatch.setattr(bestrq, "SCORES_AT_ONCE", 8 * 512 * 3)
    assert torch.equal(model.quantise(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2]), together)


def test_targets_do_not_depend_on_threads():
    model, frames, found = tiny(n_codes=512, n_codebooks=8), torch.randn(300, 48, generator=generator()), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(model.quantise(frames))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_near_ties_are_decided_beyond_float32():
    model = tiny(n_codes=64)
    # Twins that differ in the last bits of float32: a float32 search would take either.
    model.codes[:, 1::2] = model.codes[:, ::2].nextafter(torch.randn(3, 32, 5, generator=generator()))
    frames = torch.randn(200, 48, generator=generator())
    vectors = np.einsum("mf,qfd->qmd", frames.double().numpy(), model.projections.double().numpy())
    scores = np.einsum("qmd,qcd->mqc", vectors, model.codes.double().numpy())
    assert torch.equal(model.quantise(frames), torch.tensor(scores.argmax(-1)))
    in_float32 = (frames @ model.projections @ model.codes.transpose(1, 2)).argmax(-1).T
    assert (in_float32 != model.quantise(frames)).any()


def test_autocast_does_not_change_targets():
    model, frames = tiny(n_codes=512), torch.randn(50, 48)
    expected = model.quantise(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.quantise(frames), expected)


def test_the_quantiser_is_fixed_by_its_seed_saved_and_never_trained():
    first, second = tiny(seed=1), tiny(seed=2)
    other = BestRQ(first.encoder, BestRQConfig(**TINY, seed=5))
    assert torch.equal(first.projections, second.projections)
    assert torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, other.codes)
    assert {"projections", "codes"} <= set(first.state_dict())
    assert not {"projections", "codes"} & {name for name, _ in first.named_parameters()}
    torch.testing.assert_close(first.codes.norm(dim=-1), torch.ones(3, 17))
    bound = math.sqrt(6 / (48 + 5))
    assert first.projections.abs().max() <= bound
    assert first.projections.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    before = first.projections.clone(), first.codes.clone()
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.5)
    first(features(), FRAMES, generator())[0].backward()
    optimizer.step()
    assert torch.equal(first.projections, before[0])
    assert torch.equal(first.codes, before[1])


def test_spans_are_those_of_their_starts():
    frames, span = torch.tensor([50, 23, 4]), 6
    hidden = span_mask(frames, 50, 0.07, span, generator(3))
    starts = torch.rand((3, 50), generator=generator(3)) < 0.07
    assert starts.any()
    for n in range(3):
        for f in range(50):
            covered = starts[n, max(0, f - span + 1) : f + 1].any()
            assert hidden[n, f] == (covered and f < frames[n])


def test_the_paper_s_masking_hides_55_5_percent():
    frames = torch.full((200,), 3000)
    hidden = span_mask(frames, 3000, 0.025, 32, generator())
    share = hidden[:, 31:].float().mean()
    assert share == pytest.approx(1 - 0.975**32, abs=0.005)
    assert share == pytest.approx(0.555, abs=0.005)
    assert hidden[:, 31:].float().std(dim=0).min() > 0.4, "rows have their own masks"
    shares = hidden[:, 31:].float().mean(dim=0)
    assert shares[:1000].mean() == pytest.approx(shares[-1000:].mean().item(), abs=0.02), "the tail is hidden as often"


def test_every_valid_frame_and_no_other_can_be_hidden():
    frames = torch.tensor([40, 7, 1]).repeat(400)
    hidden = span_mask(frames, 40, 0.1, 4, generator()).unflatten(0, (400, 3)).any(dim=0)
    assert torch.equal(hidden, torch.arange(40) < torch.tensor([40, 7, 1])[:, None])


def test_an_encoder_frame_counts_when_all_its_mel_frames_are_hidden():
    hidden = torch.rand((3, 22), generator=generator()) < 0.8
    frames = torch.tensor([22, 21, 6])
    hidden &= torch.arange(22) < frames[:, None]
    got = fully_hidden(hidden, frames, 4)
    assert got.shape == (3, 6)
    for n in range(3):
        for t in range(-(-int(frames[n]) // 4)):
            assert got[n, t] == all(hidden[n, f] for f in range(4 * t, min(4 * t + 4, int(frames[n]))))


def run(model: BestRQ, x: torch.Tensor, seed: int = 0):
    """A forward pass, with what the encoder saw and what it gave."""
    seen = {}
    handle = model.encoder.register_forward_hook(
        lambda _, given, result: seen.update(given=given[0], encoded=result[0])
    )
    result = model(x, FRAMES, generator(seed))
    handle.remove()
    seen["encoded"].retain_grad()
    return result, seen


def test_hidden_frames_are_noise_and_the_others_untouched():
    x = features() + 5
    _, seen = run(tiny(), x)
    hidden = span_mask(FRAMES, 90, 0.025, 32, generator())
    assert 0.1 < hidden.float().mean() < 0.8
    assert torch.equal(seen["given"][~hidden], x[~hidden])
    noise = seen["given"][hidden]
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std(dim=0).min() > 0.05, "noise differs from frame to frame"


def test_the_loss_is_the_cross_entropy_of_hidden_frames_alone():
    model = tiny(dtype=torch.float64)
    x = features().double()
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias.normal_()
    (loss_sum, count, metrics), seen = run(model, x)
    hidden = span_mask(FRAMES, 90, 0.025, 32, generator())
    chosen = fully_hidden(hidden, FRAMES, 4)
    expected, terms, right = 0.0, 0, 0
    for n in range(4):
        for t in range(-(-int(FRAMES[n]) // 4)):
            if not chosen[n, t]:
                continue
            frame = torch.zeros(48).double()
            real = x[n, 4 * t : min(4 * t + 4, int(FRAMES[n]))].flatten()
            frame[: len(real)] = real
            target = model.quantise(frame[None])[0]
            scores = (model.head.weight @ seen["encoded"][n, t] + model.head.bias).view(3, 17).log_softmax(-1)
            for q in range(3):
                expected -= scores[q, target[q]].item()
                right += int(scores[q].argmax() == target[q])
                terms += 1
    assert count == terms > 30
    assert loss_sum.item() == pytest.approx(expected, rel=1e-10)
    assert metrics["accuracy"] == (right, terms)
    assert metrics["masked_share"] == (hidden.sum(), 186)

    (loss_sum / count).backward()
    touched = torch.autograd.grad(run(model, x)[0][0], model.head.weight)[0]
    assert touched.abs().sum() > 0
    reached = seen["encoded"].grad.abs().sum(dim=-1) > 0
    padded = torch.zeros_like(reached)
    padded[:, : chosen.shape[1]] = chosen & (torch.arange(23) * 4 < FRAMES[:, None])
    assert torch.equal(reached, padded)


def test_the_loss_starts_at_the_logarithm_of_the_number_of_codes():
    model = tiny(n_codes=1000, n_codebooks=4)
    loss_sum, count, _ = model(features(), FRAMES, generator())
    assert loss_sum.item() / count == pytest.approx(math.log(1000), rel=0.01)


def test_a_batch_with_nothing_hidden_has_no_loss_and_zero_gradients():
    model = tiny(mask_probability=1e-9)
    loss_sum, count, metrics = model(features(), FRAMES, generator())
    loss_sum.backward()
    assert (loss_sum.item(), count, int(metrics["accuracy"][0])) == (0.0, 0, 0)
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def test_padding_with_anything_changes_nothing():
    model, x = tiny(), features()
    dirty = x.masked_fill((torch.arange(90) >= FRAMES[:, None])[..., None], float("nan"))
    clean_loss, dirty_loss = (model(given, FRAMES, generator())[0] for given in (x, dirty))
    assert torch.equal(clean_loss, dirty_loss)


def test_the_generator_alone_decides_what_is_hidden():
    model, x = tiny(), features()
    losses = [model(x, FRAMES, generator(seed))[0].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def speech_like(normalize: str) -> dict[str, torch.Tensor]:
    waveforms = []
    for seed in range(4):
        torch.manual_seed(seed)
        time = torch.arange(32_000) / 16_000
        pitch = 120 + 60 * torch.rand(1) + 20 * torch.sin(2 * math.pi * 0.8 * time)
        phase = 2 * math.pi * pitch.cumsum(0) / 16_000
        tones = torch.stack([torch.sin(k * phase) / k for k in range(1, 30)])
        envelope = torch.nn.functional.interpolate(torch.rand(1, 29, 25), size=32_000, mode="linear")[0]
        waveforms.append(0.1 * (tones * envelope).sum(0) + 1e-3 * torch.randn(32_000))
    return pad_features([log_mel(waveform, FeatureConfig(normalize=normalize)) for waveform in waveforms])


def test_normalised_features_use_many_codes_and_raw_ones_few():
    torch.manual_seed(0)
    encoder = Conformer(ConformerConfig(dim=24, n_layers=1, n_heads=2, ffn_dim=24))
    model = BestRQ(encoder, BestRQConfig(n_codebooks=4, n_codes=1024))
    used = {}
    for normalize in ("utterance", "none"):
        batch = speech_like(normalize)
        _, count, metrics = model(batch["features"], batch["frames"], generator())
        total, books = metrics["codes_used"]
        used[normalize] = int(total) / books / (count / books)
    assert used["utterance"] > 0.4, used
    assert used["none"] < 0.5 * used["utterance"], used


def test_usage_is_the_share_of_the_codes_that_even_draws_would_hit():
    draws = [len(set(np.random.default_rng(seed).integers(0, 50, 70).tolist())) for seed in range(400)]
    assert expected_codes(70, 50) == pytest.approx(np.mean(draws), rel=0.01)
    assert (expected_codes(0, 50), expected_codes(3, 1)) == (0, 1)
    model, x = tiny(n_codes=64), features()
    _, count, metrics = model(x, FRAMES, generator())
    (used, books), (usage, _) = metrics["codes_used"], metrics["code_usage"]
    assert float(usage) / books == pytest.approx(int(used) / books / expected_codes(count // books, 64))
    model.projections.zero_()
    assert model(x, FRAMES, generator())[2]["codes_used"][0] == books, "all targets are one code"


def test_a_run_whose_targets_use_few_codes_stops_and_says_why():
    model, batch = tiny(n_codes=64), {"features": features(), "frames": FRAMES}
    good, bad = BestRQObjective(0.3), BestRQObjective(0.3)
    for _ in range(2 * pretrain.PATIENCE):
        good(model, batch)
    model.projections.zero_()
    BestRQObjective(0.0)(model, batch)
    for step in range(pretrain.PATIENCE - 1):
        assert bad.low == step
        bad(model, batch)
    with pytest.raises(CodeUsageError, match=r"use \d\.\d% of the codes .* below least_code_usage \(30\.0%\)"):
        bad(model, batch)
    with pytest.raises(ValueError, match="least_code_usage must be"):
        load_recipe(TINY_RECIPE, BestRQRecipe, ["least_code_usage=1.5"])


def test_training_lowers_the_loss_and_reaches_the_encoder():
    model, batch = tiny(n_codes=16), speech_like("utterance")
    x = batch["features"][..., ::7][..., :12].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss_sum, count, _ = model(x, batch["frames"], generator(step))
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
        losses.append(loss_sum.item() / count)
    assert all(weight.grad is not None for weight in model.parameters())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


def test_random_crop_takes_whole_stretches_everywhere():
    utterance = torch.arange(50.0)[:, None].expand(50, 3)
    assert random_crop(utterance, 50) is utterance
    starts = set()
    for seed in range(300):
        crop = random_crop(utterance, 45, generator(seed))
        assert torch.equal(crop[:, 0], crop[0, 0] + torch.arange(45.0))
        starts.add(int(crop[0, 0]))
    assert starts == set(range(6))
    assert random_crop(torch.zeros(7000, 1)).shape == (6000, 1)


def test_config_errors_name_the_field():
    with pytest.raises(ValueError, match="n_codes must be at least 1"):
        BestRQConfig(n_codes=0)
    with pytest.raises(ValueError, match="mask_probability"):
        BestRQConfig(mask_probability=0.0)


def test_pre_training_in_batches_by_length(tmp_path):
    with ShardWriter(tmp_path / "data" / "%06d.tar") as writer:
        for i in range(24):
            file = io.BytesIO()
            noise = 0.1 * torch.randn(8_000 + 4_000 * (i % 6), generator=generator(i))
            soundfile.write(file, noise.numpy(), 16_000, format="FLAC")
            writer.write(f"{i}", {"flac": file.getvalue()})
    (tmp_path / "recipe.yaml").write_text(f"""
stage: speech.bestrq
conformer: {{dim: 24, n_layers: 1, n_heads: 2, ffn_dim: 40}}
bestrq: {{n_codebooks: 2, n_codes: 16}}
data:
  sources: [{{shards: '{tmp_path}/data/*.tar', epochs: 3}}]
  bucket: {{budget: 450, window: 24}}
optimizer: {{lr: 1.0e-3}}
schedule: {{kind: constant}}
trainer: {{steps: 5, batch_size: 8, accumulate: 2}}
""")
    recipe = load_recipe(tmp_path / "recipe.yaml", BestRQRecipe)
    collate = AudioCollator(recipe.features)
    batches = list(open_loader(recipe.data, collate, 1, lengths=collate.lengths))
    assert max(batch["features"].shape[:2].numel() for batch in batches) <= 450
    assert sum(len(batch["frames"]) for batch in batches) == 72
    result = pretrain_encoder(recipe, tmp_path / "run")
    assert result["steps"] == 5
    assert (tmp_path / "run" / "encoder.safetensors").exists()
