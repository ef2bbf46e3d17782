"""Samples and shards: decoding, storing, mixing and loading. Knows no model."""

from .bad_samples import BadSample, LoaderError
from .buckets import BucketConfig, BucketLoader
from .byte_cache import ByteCache
from .dialogs import DialogError, Message, Part, dialog_sample, parse_dialog
from .drafts import Draft, InputError, Problem
from .folder_tree import FolderTree
from .loader import Loader
from .manifests import Columns, Manifest
from .media import Clip, MediaError, load_audio, load_image, load_video
from .mixture import Mixture, Place
from .packing import fill, pack
from .permutation import Permutation
from .shard_survey import Survey, survey_shards
from .shard_writing import write_shards
from .shards import Fault, Sample, ShardError, ShardReader, ShardWriter
from .sources import SourceConfig
from .torch_dataset import ShardDataset, ShardLoader

__all__ = [
    "BadSample",
    "BucketConfig",
    "BucketLoader",
    "ByteCache",
    "Clip",
    "Columns",
    "DialogError",
    "Draft",
    "Fault",
    "FolderTree",
    "InputError",
    "Loader",
    "LoaderError",
    "Manifest",
    "MediaError",
    "Message",
    "Mixture",
    "Part",
    "Permutation",
    "Place",
    "Problem",
    "Sample",
    "ShardDataset",
    "ShardError",
    "ShardLoader",
    "ShardReader",
    "ShardWriter",
    "SourceConfig",
    "Survey",
    "dialog_sample",
    "fill",
    "load_audio",
    "load_image",
    "load_video",
    "pack",
    "parse_dialog",
    "survey_shards",
    "write_shards",
]
