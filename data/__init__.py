"""Samples and shards: decoding, storing, mixing and loading. Knows no model."""

from .byte_cache import ByteCache
from .dialogs import DialogError, Message, Part, dialog_sample, parse_dialog
from .loader import BadSample, Loader, LoaderError
from .media import Clip, MediaError, load_audio, load_image, load_video
from .mixture import Mixture, Place
from .packing import fill, pack
from .shards import Fault, Sample, ShardError, ShardReader, ShardWriter

__all__ = [
    "BadSample",
    "ByteCache",
    "Clip",
    "DialogError",
    "Fault",
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
