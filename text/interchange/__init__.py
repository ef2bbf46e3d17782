"""The layouts of others, in and out: Hugging Face's and Meta's."""

from .huggingface import (
    config_from_hf,
    config_to_hf,
    from_hf_state_dict,
    hf_name,
    load_huggingface,
    save_huggingface,
    to_hf_state_dict,
)
from .meta import config_from_meta, config_to_meta, load_meta, save_meta
from .tensor_files import ModelDirectoryError

__all__ = [
    "ModelDirectoryError",
    "config_from_hf",
    "config_from_meta",
    "config_to_hf",
    "config_to_meta",
    "from_hf_state_dict",
    "hf_name",
    "load_huggingface",
    "load_meta",
    "save_huggingface",
    "save_meta",
    "to_hf_state_dict",
]
