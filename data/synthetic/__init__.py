"""Made data: scenes, moving scenes, spoken sentences and the dialogues on them, from a seed, without a download."""

from .sets import SetSizes, build, set_names

__all__ = ["SetSizes", "build", "set_names"]
