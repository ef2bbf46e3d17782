"""Speech in: features, the Conformer encoder, its objectives, and the adapter that joins it to the language
model (section 8 of "The Llama 3 Herd of Models", arXiv 2407.21783)."""

from .adapter import SpeechAdapter, SpeechAdapterConfig, SpeechPreparation, adapter_preset
from .bestrq import BestRQ, BestRQConfig, random_crop
from .conformer import Conformer, ConformerConfig, conformer_preset
from .ctc import ctc_loss, greedy_ctc
from .features import (
    FeatureConfig,
    LogMelStream,
    SpecAugmentConfig,
    feature_statistics,
    log_mel,
    pad_features,
    spec_augment,
)

__all__ = [
    "BestRQ",
    "BestRQConfig",
    "Conformer",
    "ConformerConfig",
    "FeatureConfig",
    "LogMelStream",
    "SpecAugmentConfig",
    "SpeechAdapter",
    "SpeechAdapterConfig",
    "SpeechPreparation",
    "adapter_preset",
    "conformer_preset",
    "ctc_loss",
    "feature_statistics",
    "greedy_ctc",
    "log_mel",
    "pad_features",
    "random_crop",
    "spec_augment",
]
