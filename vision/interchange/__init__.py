"""Vision weights of others, in and out: towers of timm and open_clip, and Llama 3.2 Vision in Hugging Face's layout
and in Meta's."""

from .towers import (
    ForeignConfig,
    InterchangeError,
    OpenClipEncoder,
    TimmEncoder,
    build_encoder,
    load_open_clip,
    load_timm,
    load_vision_state,
)

__all__ = [
    "ForeignConfig",
    "InterchangeError",
    "OpenClipEncoder",
    "TimmEncoder",
    "build_encoder",
    "load_open_clip",
    "load_timm",
    "load_vision_state",
]
