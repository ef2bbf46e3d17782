"""Sight and motion: the image encoder, its contrastive stage, and the image and video adapters."""

from .contrastive import ContrastiveModel, TextTower, TextTowerConfig, clip_loss
from .encoder import VisionConfig, VisionTransformer
from .image_adapter import ImageAdapter, ImageAdapterConfig, placement
from .interchange import (
    ForeignConfig,
    InterchangeError,
    OpenClipEncoder,
    TimmEncoder,
    build_encoder,
    load_open_clip,
    load_timm,
    load_vision_state,
)
from .packed import Encoder, PackedTiles
from .tiles import Arrangement, ImagePreparation, VideoPreparation, arrange
from .video_adapter import VideoAdapter, VideoAdapterConfig

__all__ = [
    "Arrangement",
    "ContrastiveModel",
    "Encoder",
    "ForeignConfig",
    "ImageAdapter",
    "ImageAdapterConfig",
    "ImagePreparation",
    "InterchangeError",
    "OpenClipEncoder",
    "PackedTiles",
    "TextTower",
    "TextTowerConfig",
    "TimmEncoder",
    "VideoAdapter",
    "VideoAdapterConfig",
    "VideoPreparation",
    "VisionConfig",
    "VisionTransformer",
    "arrange",
    "build_encoder",
    "clip_loss",
    "load_open_clip",
    "load_timm",
    "load_vision_state",
    "placement",
]
