"""How an error on one process ends all of them, with its own message and not with those of the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

HEAD_START = 1.0  # seconds; torchrun looks ten times a second


@contextmanager
def failures_told() -> Iterator[None]:
    """Leaves an error that passes through it where torchrun looks for the cause of a failure, and prints from there.

    When a process dies, collectives fail on all others within milliseconds. Those errors say nothing of the cause, and
    wait until torchrun has seen the process that died of it.
    """
    try:
        yield
    except Exception as error:
        if _is_of_a_collective(error):
            time.sleep(HEAD_START)
        get_error_handler().record_exception(error)
        raise


def _is_of_a_collective(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("distributed_c10d.py")
