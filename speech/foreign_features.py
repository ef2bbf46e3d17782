"""Features that other people's encoders were trained on: those of Whisper, and Kaldi's as Wav2Vec2-BERT takes them."""

from __future__ import annotations

from functools import lru_cache

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from .features import FeatureConfig


def whisper_features(n_mels: int = 80) -> FeatureConfig:
    """Whisper's: 80 bins, or 128 since its third version."""
    return FeatureConfig(kind="whisper", n_mels=n_mels, n_fft=400, f_min=0.0)


def kaldi_features() -> FeatureConfig:
    """Those of SeamlessM4T and Wav2Vec2-BERT."""
    return FeatureConfig(kind="kaldi")


def foreign_features(waveform: Tensor, config: FeatureConfig) -> Tensor:
    """Features (F, C) of one utterance (samples,), of `config.kind`.

    Raises:
        ValueError: samples that are not finite.
    """
    with torch.autocast(waveform.device.type, enabled=False):
        features = (_whisper if config.kind == "whisper" else _kaldi)(waveform.float(), config)
    if not torch.isfinite(features).all():
        raise ValueError("the waveform has samples that are not finite")
    return features


@lru_cache(maxsize=4)
def _whisper_constants(n_fft: int, n_mels: int, sample_rate: int) -> tuple[Tensor, Tensor]:
    filters = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return torch.hann_window(n_fft), filters


def _whisper(waveform: Tensor, config: FeatureConfig) -> Tensor:
    """Whisper pads to 30 s before and the encoder's wrapper afterwards: what is computed here are the frames that see a
    part of the utterance."""
    window, filters = _whisper_constants(config.n_fft, config.n_mels, config.sample_rate)
    reach, frames = config.n_fft // 2, config.frames(len(waveform))
    padded = F.pad(waveform[None], (reach, 0), mode="reflect")[0]
    padded = F.pad(padded, (0, max(0, (frames - 1) * config.hop + config.n_fft - len(padded))))
    spectrum = torch.stft(
        padded, config.n_fft, config.hop, window=window.to(waveform.device), center=False, return_complex=True
    )
    power = spectrum.real.square() + spectrum.imag.square()
    scores = (power.transpose(0, 1)[:frames] @ filters.to(waveform.device)).clamp_min(1e-10).log10()
    return (torch.maximum(scores, scores.max() - 8) + 4) / 4


def _kaldi(waveform: Tensor, config: FeatureConfig) -> Tensor:
    features = torchaudio.compliance.kaldi.fbank(
        waveform[None] * 2**15, num_mel_bins=config.n_mels, sample_frequency=config.sample_rate
    )
    deviation = features.var(dim=0, correction=1) if len(features) > 1 else torch.zeros_like(features[0])
    return (features - features.mean(dim=0)) / (deviation + 1e-7).sqrt()
