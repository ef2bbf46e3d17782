"""Log-mel features (section 8.2.1 of "The Llama 3 Herd of Models", arXiv 2407.21783: 80 bins, one frame for
every 10 ms).

The paper names neither window, mel range nor normalisation. Here: a 25 ms Hann window, HTK mel filters from
20 Hz to half the sample rate, natural logarithm, no pre-emphasis and no dither, mean and variance over each
utterance. Every utterance is computed alone, so that its features are the same bits in any batch.

Letters in shapes: N utterances, F mel frames, C mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torchaudio
from torch import Tensor

Kind = Literal["log_mel", "whisper", "kaldi"]
"""`log_mel`: as above. `whisper` and `kaldi` are what encoders of others were trained on; see
`herdkit.speech.foreign_features`."""

Normalization = Literal["utterance", "none"]
"""`utterance`: every bin has mean 0 and variance 1 over the frames of its utterance. Without it BEST-RQ uses
a handful of its codes, since all frames share the direction of the mean spectrum. `none`: plain log-mels, for
uses that cannot wait for the end of the utterance."""


@dataclass(kw_only=True)
class FeatureConfig:
    """How waveforms become features.

    Args:
        sample_rate: Hz.
        n_mels: bins C.
        window, hop, n_fft: samples of the Hann window, between frames, and of the Fourier transform.
        f_min, f_max: Hz, the range of the mel filters.
        log_floor: added to no energy, but replaces smaller ones. The default is about what the rounding of
            16-bit samples leaves in a bin, so that digital silence and a quiet room look alike.
        normalize: see `Normalization`.
        kind: see `Kind`; the others take no notice of `log_floor` and `normalize`.
    """

    sample_rate: int = 16_000
    n_mels: int = 80
    window: int = 400
    hop: int = 160
    n_fft: int = 512
    f_min: float = 20.0
    f_max: float = 8000.0
    log_floor: float = 1e-8
    normalize: Normalization = "utterance"
    kind: Kind = "log_mel"

    def __post_init__(self):
        if not 0 < self.hop <= self.window <= self.n_fft:
            raise ValueError(
                f"hop ({self.hop}), window ({self.window}) and n_fft ({self.n_fft}) must be positive and in "
                "rising order"
            )
        if (self.n_fft - self.hop) % 2:
            raise ValueError(f"n_fft ({self.n_fft}) minus hop ({self.hop}) must be even")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_min ({self.f_min}) must be below f_max ({self.f_max}), and that at most half of "
                f"sample_rate ({self.sample_rate})"
            )
        for name in ("n_mels", "log_floor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.normalize not in ("utterance", "none"):
            raise ValueError(f"normalize must be utterance or none, not {self.normalize!r}")
        if self.kind not in ("log_mel", "whisper", "kaldi"):
            raise ValueError(f"kind must be log_mel, whisper or kaldi, not {self.kind!r}")

    def frames(self, samples: int) -> int:
        """Mel frames of a waveform: one for every full hop, `samples // hop`; of kind "whisper" as many as see a part
        of it, of kind "kaldi" as many as see nothing else.

        Raises:
            ValueError: fewer samples than one window.
        """
        if samples < self.window:
            raise ValueError(
                f"{samples} samples of audio at {self.sample_rate} Hz are less than a window ({self.window})"
            )
        if self.kind == "whisper":
            return -(-(samples + self.n_fft // 2) // self.hop)
        if self.kind == "kaldi":
            return 1 + (samples - self.window) // self.hop
        return samples // self.hop


@lru_cache(maxsize=8)
def _constants(
    sample_rate: int, n_mels: int, window: int, n_fft: int, f_min: float, f_max: float
) -> tuple[Tensor, Tensor]:
    filters = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, norm=None, mel_scale="htk"
    )
    return torch.hann_window(window), filters


def log_mel(waveform: Tensor, config: FeatureConfig) -> Tensor:
    """Features of one utterance.

    Frame i is centred on the middle of samples [i * hop, (i + 1) * hop); zeros stand beyond both ends.

    Args:
        waveform: (samples,), nominally in -1..1; computed in float32, also under autocast.

    Returns:
        (F, C) float32, F = `config.frames(samples)`.

    Raises:
        ValueError: not one-dimensional, shorter than a window, or with samples that are not finite.
    """
    if waveform.dim() != 1:
        raise ValueError(f"a waveform has one dimension, not the shape {tuple(waveform.shape)}")
    config.frames(waveform.shape[0])
    if config.kind != "log_mel":
        from .foreign_features import foreign_features

        return foreign_features(waveform, config)
    window, filters = (
        constant.to(waveform.device)
        for constant in _constants(
            config.sample_rate, config.n_mels, config.window, config.n_fft, config.f_min, config.f_max
        )
    )
    with torch.autocast(waveform.device.type, enabled=False):
        spectrum = torchaudio.functional.spectrogram(
            waveform.float(),
            pad=(config.n_fft - config.hop) // 2,
            window=window,
            n_fft=config.n_fft,
            hop_length=config.hop,
            win_length=config.window,
            power=None,
            normalized=False,
            center=False,
        )
        # Squares of the parts: torchaudio's own power=2 goes through the absolute value and takes twice as
        # long.
        power = spectrum.real.square() + spectrum.imag.square()
        features = (power.transpose(0, 1) @ filters).clamp_min(config.log_floor).log()
        if config.normalize == "utterance":
            features = features - features.mean(dim=0)
            features = features * torch.rsqrt(features.square().mean(dim=0) + 1e-5)
    if not torch.isfinite(features).all():
        raise ValueError("the waveform has samples that are not finite")
    return features


def pad_features(features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Batches utterances (F_i, C): "features" (N, max F_i, C), zeros on the right, and "frames" (N,)
    int64."""
    return {
        "features": torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True),
        "frames": torch.tensor([len(item) for item in features]),
    }


@dataclass(kw_only=True)
class SpecAugmentConfig:
    """SpecAugment (arXiv 1904.08779) with time masks in proportion to the utterance; the paper does not use
    it. Defaults are those of Conformer (arXiv 2005.08100).

    Args:
        bin_masks: masks over mel bins; bin_width: the most bins that one hides.
        time_masks: masks over frames; time_share: the largest share of an utterance's frames that one hides.
    """

    bin_masks: int = 2
    bin_width: int = 27
    time_masks: int = 10
    time_share: float = 0.05

    def __post_init__(self):
        for name in ("bin_masks", "bin_width", "time_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.time_share <= 1:
            raise ValueError(f"time_share must be in 0..1, not {self.time_share}")


def spec_augment(
    features: Tensor, frames: Tensor, config: SpecAugmentConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Hides random bins and spans of time of normalised features (N, F, C) with zeros, their mean.

    Every utterance has its own masks, inside its own frames. Drawn from `generator`, on the features' device,
    or from torch's default one.
    """
    N, size, bins = features.shape
    widest = torch.full((N,), float(min(config.bin_width, bins)), device=features.device)
    in_bins = _random_spans(torch.full_like(widest, bins), widest, config.bin_masks, bins, generator)
    widest = (frames * config.time_share).floor()
    in_time = _random_spans(frames.float(), widest, config.time_masks, size, generator)
    return features.masked_fill(in_bins[:, None, :] | in_time[:, :, None], 0)


def _random_spans(lengths: Tensor, widest: Tensor, count: int, size: int, generator: torch.Generator | None) -> Tensor:
    """(N, size) bool: the union of `count` spans in each row, of 0..widest places, inside its first
    `lengths`."""
    uniform = torch.rand((2, len(lengths), count), generator=generator, device=lengths.device)
    width = (uniform[0] * (widest[:, None] + 1)).floor()
    start = (uniform[1] * (lengths[:, None] - width + 1)).floor()
    place = torch.arange(size, device=lengths.device)
    return ((place >= start[..., None]) & (place < (start + width)[..., None])).any(dim=1)
