import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchaudio
from herdkit.speech import (
    FeatureConfig,
    LogMelStream,
    SpecAugmentConfig,
    feature_statistics,
    log_mel,
    pad_features,
    spec_augment,
)
from omegaconf import OmegaConf
from transformers.audio_utils import mel_filter_bank

RAW = FeatureConfig(normalize="none")


def tone(samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 16_000
    voice = sum(torch.sin(2 * torch.pi * 140 * k * time + k * torch.sin(9 * time)) / k for k in range(1, 25))
    return (0.1 * voice + 0.01 * torch.randn(samples, generator=generator)) * (1.2 + torch.sin(17 * time))


def test_log_mel_equals_torchaudio_mel_spectrogram():
    waveform = tone(40_000)
    oracle = torchaudio.transforms.MelSpectrogram(
        sample_rate=16_000,
        n_fft=512,
        win_length=400,
        hop_length=160,
        f_min=20.0,
        f_max=8000.0,
        n_mels=80,
        pad=176,
        center=False,
    )
    expected = oracle(waveform).clamp_min(1e-8).log().T
    torch.testing.assert_close(log_mel(waveform, RAW), expected, rtol=1e-4, atol=1e-4)


def test_log_mel_equals_a_plain_fourier_sum_with_transformers_filters():
    waveform = tone(1999)
    filters = mel_filter_bank(257, 80, 20.0, 8000.0, 16_000, norm=None, mel_scale="htk")
    padded = np.pad(waveform.double().numpy(), 176)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    angles = np.outer(np.arange(257), np.arange(512)) * (2 * np.pi / 512)
    rows = []
    for i in range(1999 // 160):
        frame = np.zeros(512)
        frame[56:456] = padded[160 * i + 56 : 160 * i + 456] * hann
        power = (np.cos(angles) @ frame) ** 2 + (np.sin(angles) @ frame) ** 2
        rows.append(np.log(np.maximum(power @ filters, 1e-8)))
    torch.testing.assert_close(log_mel(waveform, RAW), torch.tensor(np.stack(rows)).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [400, 479, 480, 481, 1600, 16_000, 39_999, 40_000])
def test_one_frame_for_every_full_hop(samples):
    assert log_mel(tone(samples), RAW).shape == (samples // 160, 80)
    assert RAW.frames(samples) == samples // 160


def test_a_frame_is_centred_on_its_hop():
    waveform = torch.zeros(16_000)
    waveform[160 * 40 + 80] = 1.0
    energy = log_mel(waveform, RAW).exp().sum(dim=1)
    assert energy.argmax() == 40
    torch.testing.assert_close(energy[39], energy[41], rtol=2e-3, atol=0)


def test_sixty_seconds_are_six_thousand_frames():
    assert RAW.frames(960_000) == 6000


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(399), "399 samples .* less than a window"),
        (torch.zeros(2, 4000), r"one dimension, not the shape \(2, 4000\)"),
        (torch.full((4000,), float("nan")), "not finite"),
    ],
)
def test_unusable_waveforms_are_named(waveform, message):
    with pytest.raises(ValueError, match=message):
        log_mel(waveform, FeatureConfig())


def test_every_bin_has_mean_zero_and_variance_one():
    features = log_mel(tone(40_000), FeatureConfig()).double()
    torch.testing.assert_close(features.mean(0), torch.zeros(80).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(0, correction=0), torch.ones(80).double(), atol=1e-3, rtol=0)


def test_loudness_does_not_matter_after_normalisation():
    waveform = tone(24_000)
    torch.testing.assert_close(
        log_mel(waveform, FeatureConfig()), log_mel(0.1 * waveform, FeatureConfig()), atol=2e-3, rtol=0
    )
    raw, quiet = log_mel(waveform, RAW), log_mel(0.1 * waveform, RAW)
    torch.testing.assert_close(raw - quiet, torch.full_like(raw, np.log(100)), atol=1e-3, rtol=0)


def test_silence_is_finite():
    features = log_mel(torch.zeros(8000), FeatureConfig())
    torch.testing.assert_close(features, torch.zeros(50, 80), atol=0.01, rtol=0)


def test_a_batch_holds_the_same_bits_as_each_utterance_alone():
    waveforms = [tone(samples, seed) for seed, samples in enumerate((400, 40_000, 16_123, 960))]
    batch = pad_features([log_mel(waveform, FeatureConfig()) for waveform in waveforms])
    assert batch["features"].shape == (4, 250, 80)
    assert batch["frames"].tolist() == [2, 250, 100, 6]
    for row, frames, waveform in zip(batch["features"], batch["frames"], waveforms, strict=True):
        assert torch.equal(row[:frames], log_mel(waveform, FeatureConfig()))
        assert not row[frames:].any()


def test_autocast_changes_nothing():
    waveform = tone(8000)
    expected = log_mel(waveform, FeatureConfig())
    with torch.autocast("cpu", torch.bfloat16):
        got = log_mel(waveform.double(), FeatureConfig())
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "values",
    [{"normalize": "batch"}, {"f_max": 9000.0}, {"hop": 500}, {"hop": 161}, {"n_mels": 0}],
)
def test_config_errors_name_the_field(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        FeatureConfig(**values)


def test_configs_pass_through_omegaconf_and_json():
    for config in (FeatureConfig(n_mels=40), SpecAugmentConfig(bin_masks=1)):
        assert OmegaConf.to_object(OmegaConf.structured(config)) == config
        assert type(config)(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("pieces", [1, 160, 161, 999, 30_000])
@pytest.mark.parametrize("samples", [400, 3999, 16_000])
def test_a_stream_gives_the_frames_of_the_whole(samples, pieces):
    if samples > 4000 and pieces == 1:
        pytest.skip("many calls, nothing new")
    waveform, stream = tone(samples), LogMelStream(RAW)
    found = torch.cat([*[stream.push(part) for part in waveform.split(pieces)], stream.finish()])
    torch.testing.assert_close(found, log_mel(waveform, RAW), atol=1e-5, rtol=0)


def test_frames_of_a_stream_come_as_soon_as_they_are_known():
    stream, counts = LogMelStream(RAW), []
    for part in tone(1600).split(1):
        counts.append(len(stream.push(part)))
    assert [i + 1 for i, count in enumerate(counts) if count] == list(range(512 - 176, 1601, 160))
    assert len(stream.finish()) == 10 - sum(counts)


def test_a_stream_refuses_what_the_whole_refuses():
    for bad in (float("nan"), float("inf")):
        waveform, stream = tone(2000), LogMelStream(RAW)
        waveform[1000] = bad
        with pytest.raises(ValueError, match="not finite"):
            log_mel(waveform, RAW)
        stream.push(waveform[:900])
        with pytest.raises(ValueError, match="not finite"):
            stream.push(waveform[900:])
    stream = LogMelStream(RAW)
    stream.push(tone(399))
    with pytest.raises(ValueError, match="399 samples of audio"):
        stream.finish()
    with pytest.raises(ValueError, match="one dimension"):
        LogMelStream(RAW).push(torch.zeros(2, 800))


def test_fixed_statistics_normalise_a_data_set():
    raw = [log_mel(tone(8000 + 1000 * seed, seed), RAW) for seed in range(4)]
    mean, deviation = feature_statistics(raw)
    config = FeatureConfig(normalize="fixed", mean=mean, deviation=deviation)
    together = torch.cat([log_mel(tone(8000 + 1000 * seed, seed), config) for seed in range(4)]).double()
    torch.testing.assert_close(together.mean(0), torch.zeros(80).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(together.std(0, correction=0), torch.ones(80).double(), atol=1e-4, rtol=0)
    stream = LogMelStream(config)
    found = torch.cat([stream.push(tone(8000)), stream.finish()])
    torch.testing.assert_close(found, log_mel(tone(8000), config), atol=1e-5, rtol=0)
    assert OmegaConf.to_object(OmegaConf.structured(config)) == config
    with pytest.raises(ValueError, match="no frames"):
        feature_statistics([])
    with pytest.raises(ValueError, match="80 values of mean and deviation, not with 3 and 0"):
        FeatureConfig(normalize="fixed", mean=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="not known before its end"):
        LogMelStream(FeatureConfig())


def augment(config, seed=0, frames=None):
    frames = torch.full((64,), 200) if frames is None else frames
    return spec_augment(torch.ones(64, 200, 80), frames, config, torch.Generator().manual_seed(seed)) == 0


def runs(mask: torch.Tensor) -> list[int]:
    """Lengths of the runs of True in a one-dimensional mask."""
    text = "".join("x" if value else " " for value in mask.tolist())
    return [len(run) for run in text.split()]


def test_spec_augment_hides_whole_bins_and_whole_frames():
    hidden = augment(SpecAugmentConfig(bin_masks=1, bin_width=27, time_masks=1, time_share=0.25))
    for row in hidden:
        bins, frames = row.all(dim=0), row.all(dim=1)
        assert torch.equal(row, bins[None, :] | frames[:, None])
        assert len(runs(bins)) <= 1
        assert len(runs(frames)) <= 1
        assert sum(runs(bins)) <= 27
        assert sum(runs(frames)) <= 50
    widths = torch.tensor([row.all(dim=1).sum() for row in hidden]).float()
    assert widths.unique().numel() > 20, "rows have their own masks"
    assert 18 < widths.mean() < 32, "widths are uniform in 0..50"
    assert hidden.all(dim=1).any(dim=0).float().mean() > 0.9, "bins all over the range are hidden"


def test_spec_augment_time_masks_stay_inside_the_utterance_and_scale_with_it():
    frames = torch.tensor([20, 200] * 32)
    hidden = augment(SpecAugmentConfig(bin_masks=0, time_masks=1, time_share=0.5), frames=frames).all(dim=2)
    assert not hidden[::2, 20:].any()
    assert hidden[::2].sum(dim=1).max() in range(7, 11)
    assert hidden[1::2].sum(dim=1).max() > 70
    assert hidden[1::2, 190:].any()


def test_spec_augment_is_a_function_of_the_generator_and_leaves_its_input_alone():
    config = SpecAugmentConfig()
    assert torch.equal(augment(config, 1), augment(config, 1))
    assert not torch.equal(augment(config, 1), augment(config, 2))
    torch.manual_seed(3)
    first = spec_augment(torch.ones(2, 50, 80), torch.tensor([50, 30]), config)
    torch.manual_seed(3)
    assert torch.equal(first, spec_augment(torch.ones(2, 50, 80), torch.tensor([50, 30]), config))
    features = torch.randn(2, 50, 80)
    kept = features.clone()
    augmented = spec_augment(features, torch.tensor([50, 30]), config)
    assert torch.equal(features, kept)
    assert ((augmented == features) | (augmented == 0)).all()
    nothing = SpecAugmentConfig(bin_masks=0, time_masks=0)
    assert torch.equal(spec_augment(features, torch.tensor([50, 30]), nothing), features)
