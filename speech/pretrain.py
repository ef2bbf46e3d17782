"""Self-supervised pre-training of the Conformer with BEST-RQ (section 8.3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.media import audio_length, load_audio
from ..data.media_check import audio_of
from ..data.shards import Sample
from ..data.sources import DataConfig, open_loader
from ..text.model_directory import save_part
from ..train.parallel import rank, world_size
from ..train.recipe import Stage, StageRecipe, train_by
from .bestrq import MAX_FRAMES, BestRQ, BestRQConfig, random_crop
from .conformer import Conformer, ConformerConfig
from .features import FeatureConfig, log_mel, pad_features

PATIENCE = 20
"""Micro-batches with few codes before a run stops; a few may well hold silence alone."""


@dataclass(kw_only=True)
class BestRQRecipe(StageRecipe):
    """
    Args:
        conformer: sizes of the encoder.
        features: its input.
        bestrq: codebooks and masks.
        data: samples with an audio member; words are not needed.
        least_code_usage: the run stops with an error once the targets of `PATIENCE` micro-batches in a row use less of
            the codes than this share of what as many even draws would hit: there is little to learn then. 0 never
            stops.
    """

    conformer: ConformerConfig
    features: FeatureConfig = field(default_factory=FeatureConfig)
    bestrq: BestRQConfig = field(default_factory=BestRQConfig)
    data: DataConfig = field(default_factory=DataConfig)
    least_code_usage: float = 0.05

    def __post_init__(self):
        if not 0 <= self.least_code_usage < 1:
            raise ValueError(f"least_code_usage must be at least 0 and below 1, not {self.least_code_usage}")


class AudioCollator:
    """Samples with audio to padded features; recordings over a minute are cropped (section 8.3.1), at a place
    that depends on the position alone."""

    def __init__(self, config: FeatureConfig):
        self.config = config

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: a sample has no audio; MediaError: it does not decode.
        """
        features = []
        for position, sample in samples:
            waveform = load_audio(audio_of(sample), self.config.sample_rate)
            generator = torch.Generator().manual_seed(position)
            features.append(random_crop(log_mel(waveform, self.config), generator=generator))
        return pad_features(features)

    def lengths(self, sample: Sample) -> list[int]:
        """Mel frames of a sample, for batches by length; errors as above."""
        samples = audio_length(audio_of(sample), self.config.sample_rate)
        return [min(self.config.frames(samples), MAX_FRAMES)]


class CodeUsageError(ValueError):
    """The targets use so few codes that there is little to learn."""


class BestRQObjective:
    """The model's own loss, guarded against targets of few codes; see `BestRQRecipe.least_code_usage`."""

    def __init__(self, least_code_usage: float):
        self.least = least_code_usage
        self.low = 0

    def __call__(
        self, model: BestRQ, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, int, dict[str, tuple[Tensor, Tensor | int]]]:
        """
        Raises:
            CodeUsageError: see `BestRQRecipe.least_code_usage`.
        """
        loss, count, metrics = model(batch["features"], batch["frames"])
        used, books = metrics["code_usage"]
        usage = float(used) / int(books)
        self.low = self.low + 1 if count and usage < self.least else 0
        if self.low >= PATIENCE:
            raise CodeUsageError(
                f"the targets of {PATIENCE} batches in a row use {usage:.1%} of the codes that even draws would, below "
                f"least_code_usage ({self.least:.1%}): is features.normalize 'none', or is there nothing but silence?"
            )
        return loss, count, metrics


def pretrain_encoder(recipe: BestRQRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the encoder and writes it to `run_dir/encoder.safetensors`."""
    torch.manual_seed(recipe.trainer.seed)
    model = BestRQ(Conformer(recipe.conformer), recipe.bestrq)
    batch_size = recipe.trainer.micro_batch_size(world_size())
    collate = AudioCollator(recipe.features)
    loader = open_loader(recipe.data, collate, batch_size, rank(), world_size(), lengths=collate.lengths)
    result = train_by(recipe, model, loader, BestRQObjective(recipe.least_code_usage), run_dir)
    if rank() == 0:
        save_part(model.encoder, run_dir / "encoder.safetensors")
    return result


STAGE = Stage(BestRQRecipe, pretrain_encoder)
