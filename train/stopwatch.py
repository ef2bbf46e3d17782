"""Time between two points of the work of a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Measures what runs inside `measured()` without making the host wait for the device: on a GPU from when the device
    gets there to when it is through, elsewhere by the clock."""

    def __init__(self, device: torch.device):
        self._events = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        if self._events is not None:
            self._events[0].record()
        began = time.monotonic()
        yield
        self._seconds = time.monotonic() - began
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Of the last measurement; waits until the device is through with it."""
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
