"""What a process that trains for a parent does first."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path

LOG = "log.txt"


def end_with_parent() -> None:
    """Ends this process when its parent does, however that ends, so that no two processes ever train in one folder."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def log_to(run_dir: Path) -> None:
    """Sends what this process says to `run_dir/log.txt` from now on: the terminal is the parent's."""
    with (run_dir / LOG).open("a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
