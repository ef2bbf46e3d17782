"""Adapters by name: ours and other people's, found through the entry-point group `herdkit.adapters`."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any

from .contract import Adapter

GROUP = "herdkit.adapters"
_registered: dict[str, type[Adapter]] = {}


def register_adapter(name: str, adapter: type[Adapter]) -> None:
    """Makes an adapter class known for this process; packages declare an entry point instead:
    `[project.entry-points."herdkit.adapters"]  depth = "my_package:DepthAdapter"`."""
    _registered[name] = adapter


def adapter_names() -> list[str]:
    return sorted({*_registered, *(point.name for point in entry_points(group=GROUP))})


def adapter_class(name: str) -> type[Adapter]:
    """The adapter class of that name.

    Raises:
        LookupError: nobody registered it; names the nearest one.
        TypeError: what was registered is no `Adapter`.
    """
    if name in _registered:
        found: Any = _registered[name]
    else:
        points = list(entry_points(group=GROUP, name=name))
        if not points:
            near = difflib.get_close_matches(name, adapter_names(), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {adapter_names()}"
            raise LookupError(f"no adapter named {name!r} is registered; {hint}")
        found = points[0].load()
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise TypeError(f"the entry point {name!r} of {GROUP} is {found!r}, not a subclass of Adapter")
    return found
