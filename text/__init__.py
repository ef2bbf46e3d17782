"""The language model: architecture, vocabulary, chat format, decoding, other layouts."""

from .cache import BranchedCache, KVCache
from .completion import Completion
from .dialog import EncodedDialog, encode_dialog, encode_prompt
from .generate import KeptPrompt, generate, stream, stream_text
from .interchange import (
    config_from_hf,
    config_from_meta,
    config_to_hf,
    config_to_meta,
    from_hf_state_dict,
    to_hf_state_dict,
)
from .model import RopeScaling, Transformer, TransformerConfig
from .presets import ladder, preset
from .sampling import SamplingOptions
from .speculative import Speculation
from .tokenizer import Tokenizer
from .tools import Reply, parse_reply, system_preamble

__all__ = [
    "BranchedCache",
    "Completion",
    "EncodedDialog",
    "KVCache",
    "KeptPrompt",
    "Reply",
    "RopeScaling",
    "SamplingOptions",
    "Speculation",
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
    "stream_text",
    "system_preamble",
    "to_hf_state_dict",
]
