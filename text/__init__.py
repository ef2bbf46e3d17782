"""The language model: architecture, vocabulary, chat format, decoding, other layouts."""

from .dialog import EncodedDialog, encode_dialog, encode_prompt
from .generate import generate, stream
from .interchange import (
    config_from_hf,
    config_from_meta,
    config_to_hf,
    config_to_meta,
    from_hf_state_dict,
    to_hf_state_dict,
)
from .model import KVCache, RopeScaling, Transformer, TransformerConfig
from .presets import ladder, preset
from .tokenizer import StreamDecoder, Tokenizer
from .tools import Reply, parse_reply, system_preamble

__all__ = [
    "EncodedDialog",
    "KVCache",
    "Reply",
    "RopeScaling",
    "StreamDecoder",
    "Tokenizer",
    "Transformer",
    "TransformerConfig",
    "config_from_hf",
    "config_from_meta",
    "config_to_hf",
    "config_to_meta",
    "encode_dialog",
    "encode_prompt",
    "from_hf_state_dict",
    "generate",
    "ladder",
    "parse_reply",
    "preset",
    "stream",
    "system_preamble",
    "to_hf_state_dict",
]
