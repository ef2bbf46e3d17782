from random import Random

import numpy as np
import pytest
import soundfile
import torch
from herdkit.speech.augment import WaveformAugmentConfig, augment_waveform

RATE = 16_000


def tone(hertz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(int(RATE * seconds)) / RATE)


def peak(waveform: torch.Tensor) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax() * RATE / len(waveform))


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.37])
def test_speed_changes_length_and_pitch_together(speed):
    config = WaveformAugmentConfig(speeds=(speed,), noise_probability=0)
    changed = augment_waveform(tone(500), RATE, config, Random(0), 60 * RATE)
    assert len(changed) == pytest.approx(RATE / speed, abs=2)
    assert peak(changed) == pytest.approx(500 * speed, rel=0.01)


def test_noise_has_the_power_that_was_drawn():
    speech, found = tone(500), []
    for seed in range(30):
        config = WaveformAugmentConfig(speeds=(1.0,), noise_probability=1, noise_db=(5, 25))
        noise = augment_waveform(speech, RATE, config, Random(seed), 60 * RATE) - speech
        found.append(10 * np.log10(float(speech.square().mean() / noise.square().mean())))
    assert min(found) > 4.9
    assert max(found) < 25.1
    assert np.std(found) > 3
    assert np.mean(found) == pytest.approx(15, abs=4)


def test_noise_may_come_from_files(tmp_path):
    hum = tone(100, 0.3)
    soundfile.write(tmp_path / "hum.wav", hum.numpy(), RATE)
    config = WaveformAugmentConfig(speeds=(1.0,), noise_probability=1, noise_files=str(tmp_path / "*.wav"))
    noise = augment_waveform(tone(500), RATE, config, Random(0), 60 * RATE) - tone(500)
    assert peak(noise) == pytest.approx(100, abs=2)
    missing = WaveformAugmentConfig(noise_probability=1, noise_files="/nowhere/*.wav")
    with pytest.raises(ValueError, match="nothing matches"):
        augment_waveform(hum, RATE, missing, Random(0), 60 * RATE)


def test_silence_stays_silent_and_the_generator_decides():
    config = WaveformAugmentConfig(noise_probability=1)
    silent = augment_waveform(torch.zeros(RATE), RATE, config, Random(2), 60 * RATE)
    assert torch.isfinite(silent).all()
    assert not silent.any()
    one, same, other = (augment_waveform(tone(300), RATE, config, Random(seed), 60 * RATE) for seed in (1, 1, 5))
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize(
    "values", [{"speeds": ()}, {"speeds": (0.1,)}, {"noise_probability": 1.5}, {"noise_db": (20.0, 10.0)}]
)
def test_config_errors_name_the_field(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        WaveformAugmentConfig(**values)


def test_no_speed_makes_a_recording_longer_than_the_model_takes():
    config = WaveformAugmentConfig(speeds=(0.9, 1.1), noise_probability=0)
    changed = [augment_waveform(tone(300), RATE, config, Random(seed), len(tone(300))) for seed in range(8)]
    assert {len(one) < len(tone(300)) for one in changed} == {True}
    slow = WaveformAugmentConfig(speeds=(0.9,), noise_probability=0)
    torch.testing.assert_close(augment_waveform(tone(300), RATE, slow, Random(0), len(tone(300))), tone(300))
