"""Log-mel features (section 8.2.1 of "The Llama 3 Herd of Models", arXiv 2407.21783: 80 bins, one frame for
every 10 ms).

The paper names neither window, mel range nor normalisation. Here: a 25 ms Hann window, HTK mel filters from
20 Hz to half the sample rate, natural logarithm, no pre-emphasis and no dither, mean and variance over each
utterance. Every utterance is computed alone, so that its features are the same bits in any batch.

Letters in shapes: N utterances, F mel frames, C mel bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["log_mel", "whisper", "kaldi"]
"""`log_mel`: as above. `whisper` and `kaldi` are what encoders of others were trained on; see
`herdkit.speech.foreign_features`."""

Normalization = Literal["utterance", "fixed", "none"]
"""`utterance`: every bin has mean 0 and variance 1 over the frames of its utterance. Without it BEST-RQ uses
a handful of its codes, since all frames share the direction of the mean spectrum. `fixed`: over all frames of a
data set (`feature_statistics`), for uses that cannot wait for the end of the utterance. `none`: plain log-mels."""


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
        mean, deviation: of each bin, with "fixed".
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
    mean: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
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
        if self.normalize not in ("utterance", "fixed", "none"):
            raise ValueError(f"normalize must be utterance, fixed or none, not {self.normalize!r}")
        due = self.n_mels if self.normalize == "fixed" else 0
        if (len(self.mean), len(self.deviation)) != (due, due):
            raise ValueError(
                f"normalize: {self.normalize!r} goes with {due} values of mean and deviation, not with "
                f"{len(self.mean)} and {len(self.deviation)}; herdkit.speech.feature_statistics gives them"
            )
        if any(value <= 0 for value in self.deviation):
            raise ValueError(f"deviation must be positive, not {min(self.deviation)}")
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
    check_shape(waveform)
    config.frames(waveform.shape[0])
    if config.kind != "log_mel":
        from .foreign_features import foreign_features

        return foreign_features(waveform, config)
    pad = (config.n_fft - config.hop) // 2
    return _normalised(_log_mels(F.pad(waveform.float(), (pad, pad)), config), config)


def check_shape(waveform: Tensor) -> None:
    """ValueError for what is not (samples,)."""
    if waveform.dim() != 1:
        raise ValueError(f"a waveform has one dimension, not the shape {tuple(waveform.shape)}")


def _log_mels(padded: Tensor, config: FeatureConfig) -> Tensor:
    """(samples,) float32, with what stands before the first and after the last frame, to (F, C)."""
    window, filters = (
        constant.to(padded.device)
        for constant in _constants(
            config.sample_rate, config.n_mels, config.window, config.n_fft, config.f_min, config.f_max
        )
    )
    with torch.autocast(padded.device.type, enabled=False):
        spectrum = torchaudio.functional.spectrogram(
            padded,
            pad=0,
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
        return (power.transpose(0, 1) @ filters).clamp_min(config.log_floor).log()


def _normalised(features: Tensor, config: FeatureConfig) -> Tensor:
    """
    Raises:
        ValueError: features that are not finite, as no finite samples give.
    """
    if not torch.isfinite(features).all():
        raise ValueError("the waveform has samples that are not finite")
    if config.normalize == "utterance":
        features = features - features.mean(dim=0)
        return features * torch.rsqrt(features.square().mean(dim=0) + 1e-5)
    if config.normalize == "fixed":
        return (features - features.new_tensor(config.mean)) / features.new_tensor(config.deviation)
    return features


class LogMelStream:
    """`log_mel` of one utterance while it comes; `normalize` must not be "utterance".

    Raises:
        ValueError: it is, or the features are not of our kind.
    """

    def __init__(self, config: FeatureConfig):
        if config.normalize == "utterance" or config.kind != "log_mel":
            raise ValueError(
                "features that are normalised over the utterance are not known before its end: set normalize to fixed "
                "or none, and kind to log_mel"
            )
        self.config = config
        self.held = torch.zeros((config.n_fft - config.hop) // 2)
        self.samples = self.given = 0

    def push(self, samples: Tensor) -> Tensor:
        """Takes further samples (n,), and gives the frames (F, C) that see nothing beyond them.

        Raises:
            ValueError: not one-dimensional, or with samples that are not finite (of which frames learn in this or a
                later call).
        """
        check_shape(samples)
        self.samples += len(samples)
        self.held = torch.cat((self.held, samples.detach().cpu().float()))
        return self._take((len(self.held) - self.config.n_fft) // self.config.hop + 1)

    def finish(self) -> Tensor:
        """The frames that are left at the end, (F, C).

        Raises:
            ValueError: the whole utterance is shorter than a window, or samples are not finite.
        """
        self.config.frames(self.samples)
        count = self.samples // self.config.hop - self.given
        size = (count - 1) * self.config.hop + self.config.n_fft
        self.held = F.pad(self.held, (0, max(0, size - len(self.held))))
        return self._take(count)

    def _take(self, count: int) -> Tensor:
        config = self.config
        if count < 1:
            return torch.zeros(0, config.n_mels)
        features = _normalised(_log_mels(self.held[: (count - 1) * config.hop + config.n_fft], config), config)
        self.held, self.given = self.held[count * config.hop :], self.given + count
        return features


def feature_statistics(features: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each bin over all frames of utterances (F_i, C), computed with `normalize` "none",
    for `FeatureConfig`.

    Raises:
        ValueError: there is no frame.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for one in features:
        count, total, squares = count + len(one), total + one.double().sum(0), squares + one.double().square().sum(0)
    if not count:
        raise ValueError("no frames to take statistics of")
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp_min(1e-10).sqrt().tolist()


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
