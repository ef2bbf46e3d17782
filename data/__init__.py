"""Samples and shards: decoding, storing, mixing and loading. Knows no model."""

from .bad_samples import BadSample, LoaderError
from .dialogs import DialogError, Message, Part, dialog_sample, parse_dialog
from .loader import Loader
from .media import Clip, MediaError, load_audio, load_image, load_video
from .mixture import Mixture, Place
from .packing import fill, pack
from .shards import Sample, ShardError, ShardReader, ShardWriter

__all__ = [
    "BadSample",
    "Clip",
    "DialogError",
    "Loader",
    "LoaderError",
    "MediaError",
    "Message",
    "Mixture",
    "Part",
    "Place",
    "Sample",
    "ShardError",
    "ShardReader",
    "ShardWriter",
    "dialog_sample",
    "fill",
    "load_audio",
    "load_image",
    "load_video",
    "pack",
    "parse_dialog",
]
