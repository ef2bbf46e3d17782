"""Self-supervised pre-training of the Conformer with BEST-RQ (section 8.3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.media import audio_length, load_audio
from ..data.shards import Sample
from ..data.sources import DataConfig, open_loader
from ..text.model_directory import save_part
from ..train.parallel import rank, world_size
from ..train.recipe import Stage, StageRecipe, train_by
from .bestrq import MAX_FRAMES, BestRQ, BestRQConfig, random_crop
from .conformer import Conformer, ConformerConfig
from .features import FeatureConfig, log_mel, pad_features

AUDIO_MEMBERS = ("flac", "wav", "ogg", "mp3")


@dataclass(kw_only=True)
class BestRQRecipe(StageRecipe):
    """
    Args:
        conformer: sizes of the encoder.
        features: its input.
        bestrq: codebooks and masks.
        data: samples with an audio member; words are not needed.
    """

    conformer: ConformerConfig
    features: FeatureConfig = field(default_factory=FeatureConfig)
    bestrq: BestRQConfig = field(default_factory=BestRQConfig)
    data: DataConfig = field(default_factory=DataConfig)


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
            waveform = load_audio(self._audio(sample), self.config.sample_rate)
            generator = torch.Generator().manual_seed(position)
            features.append(random_crop(log_mel(waveform, self.config), generator=generator))
        return pad_features(features)

    def lengths(self, sample: Sample) -> list[int]:
        """Mel frames of a sample, for batches by length; errors as above."""
        samples = audio_length(self._audio(sample), self.config.sample_rate)
        return [min(self.config.frames(samples), MAX_FRAMES)]

    def _audio(self, sample: Sample) -> bytes:
        member = next((name for name in AUDIO_MEMBERS if name in sample.members), None)
        if member is None:
            raise ValueError(f"{sample.shard}: sample {sample.key} has none of {', '.join(AUDIO_MEMBERS)}")
        return sample.members[member]


def bestrq_objective(model: BestRQ, batch: Mapping[str, Tensor]):
    return model(batch["features"], batch["frames"])


def pretrain_encoder(recipe: BestRQRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the encoder and writes it to `run_dir/encoder.safetensors`."""
    torch.manual_seed(recipe.trainer.seed)
    model = BestRQ(Conformer(recipe.conformer), recipe.bestrq)
    batch_size = recipe.trainer.micro_batch_size(world_size())
    collate = AudioCollator(recipe.features)
    loader = open_loader(recipe.data, collate, batch_size, rank(), world_size(), lengths=collate.lengths)
    result = train_by(recipe, model, loader, bestrq_objective, run_dir)
    if rank() == 0:
        save_part(model.encoder, run_dir / "encoder.safetensors")
    return result


STAGE = Stage(BestRQRecipe, pretrain_encoder)
