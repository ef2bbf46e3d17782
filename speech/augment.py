"""Recordings made different before their features are computed: speed and noise. The paper names neither.

Everything is a function of the sample's position in the run, so that a run that is resumed hears the same.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
import torchaudio
from torch import Tensor

from ..data.media import load_audio


@dataclass(kw_only=True)
class WaveformAugmentConfig:
    """
    Args:
        speeds: one of these is drawn for every recording, pitch and length changing together (Ko et al., 2015).
        noise_probability: that noise is added to a recording.
        noise_db: range of the signal-to-noise ratio in dB, even, by mean power.
        noise_files: pattern of recordings of noise ("noises/*.flac"), of which each time a random stretch is taken; ""
            makes white or pink noise.
    """

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    noise_probability: float = 0.5
    noise_db: tuple[float, float] = (10.0, 20.0)
    noise_files: str = ""

    def __post_init__(self):
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"speeds must be from 0.5 to 2, at least one, not {self.speeds}")
        if not 0 <= self.noise_probability <= 1:
            raise ValueError(f"noise_probability must be in 0..1, not {self.noise_probability}")
        if self.noise_db[0] > self.noise_db[1]:
            raise ValueError(f"noise_db must be a range in rising order, not {self.noise_db}")

    @property
    def longest(self) -> float:
        """By how much the length of a recording grows at most."""
        return 1 / min(self.speeds)


def augment_waveform(
    waveform: Tensor, sample_rate: int, config: WaveformAugmentConfig, rng: Random, max_samples: int
) -> Tensor:
    """A recording (samples,) at another speed and with noise, drawn from `rng`.

    Args:
        max_samples: speeds that would make it longer are not drawn.

    Raises:
        ValueError: no file matches `noise_files`. MediaError: one that was drawn cannot be read.
    """
    speed = rng.choice([speed for speed in config.speeds if len(waveform) <= max_samples * speed] or [1.0])
    if speed != 1:
        waveform = torchaudio.functional.resample(waveform, round(100 * speed), 100)
    if rng.random() < config.noise_probability:
        noise = _noise(len(waveform), sample_rate, config, rng)
        ratio = 10 ** (rng.uniform(*config.noise_db) / 10)
        # Silence stays silent: its power is that of the noise below it.
        gain = (waveform.square().mean() / noise.square().mean().clamp_min(1e-12) / ratio).sqrt()
        waveform = waveform + gain * noise
    return waveform


def _noise(samples: int, sample_rate: int, config: WaveformAugmentConfig, rng: Random) -> Tensor:
    if config.noise_files:
        recording = _recording(rng.choice(_files(config.noise_files)), sample_rate)
        recording = recording.repeat(-(-samples // len(recording)) + 1)
        start = rng.randrange(len(recording) - samples)
        return recording[start : start + samples]
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
    if rng.random() < 0.5:
        return noise
    spectrum = torch.fft.rfft(noise)
    return torch.fft.irfft(spectrum / torch.arange(1, len(spectrum) + 1).sqrt(), samples)


@lru_cache(maxsize=4)
def _files(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern))  # noqa: PTH207 - the pattern may be absolute
    if not found:
        raise ValueError(f"noise_files: nothing matches {pattern!r}")
    return found


@lru_cache(maxsize=64)
def _recording(path: str, sample_rate: int) -> Tensor:
    return load_audio(path, sample_rate)
