"""Samples and shards: decoding, storing, mixing and loading. Knows no model."""

from .bad_samples import BadSample, LoaderError
from .buckets import BucketConfig, BucketLoader
from .dialogs import DialogError, Message, Part, dialog_sample, parse_dialog
from .loader import Loader
from .media import Clip, MediaError, load_audio, load_image, load_video
from .mixture import Mixture, Place
from .packing import fill, pack
from .permutation import Permutation
from .shards import Sample, ShardError, ShardReader, ShardWriter
from .sources import SourceConfig
from .torch_dataset import ShardDataset, ShardLoader

__all__ = [
    "BadSample",
    "BucketConfig",
    "BucketLoader",
    "Clip",
    "DialogError",
    "Loader",
    "LoaderError",
    "MediaError",
    "Message",
    "Mixture",
    "Part",
    "Permutation",
    "Place",
    "Sample",
    "ShardDataset",
    "ShardError",
    "ShardLoader",
    "ShardReader",
    "ShardWriter",
    "SourceConfig",
    "dialog_sample",
    "fill",
    "load_audio",
    "load_image",
    "load_video",
    "pack",
    "parse_dialog",
]
