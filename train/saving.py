"""When a run's checkpoints are written: while it waits, or behind its back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict

from . import checkpoint, parallel
from .config import TrainerConfig


class CheckpointWriter:
    """Writes the checkpoints of one run; a context, at whose end all are written.

    In the background (`TrainerConfig.background_checkpoints`) a save takes a copy in the memory of the host, which is
    kept for the next one, and a thread writes that, while training goes on. All processes make it at the same time, and
    save at the same updates.

    Attributes:
        last_good: the newest checkpoint.
    """

    def __init__(self, run_dir: Path, config: TrainerConfig, last_good: Path | None):
        self.run_dir, self.config, self.last_good = run_dir, config, last_good
        self._group: Any = None
        if config.background_checkpoints and parallel.world_size() > 1:
            # Of its own: on that of the training the two would take each other's messages.
            self._group = dist.new_group(backend="gloo")
        self._copy: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step` finished updates, or begins to, once the one before is written.

        Raises: what went wrong with this one, or in the background with the one before.
        """
        self.wait()
        if not self.config.background_checkpoints:
            self._write(step, tensors, state)
            return
        if self._copy.keys() != tensors.keys():
            self._copy = _create_cpu_state_dict(dict(tensors))
        copied = _copy_state_dict(dict(tensors), self._copy), copy.deepcopy(state)
        self._thread = threading.Thread(target=self._write_behind, args=(step, *copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns once everything is written.

        Raises: what went wrong with it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The checkpoint in the making was lost as well: {failure}")

    def _write_behind(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        try:
            self._write(step, tensors, state)
        except Exception as failure:  # raised in the thread that trains, see `wait`
            self._failure = failure

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        self.last_good = checkpoint.save(
            self.run_dir, step, tensors, state, self.config.keep, self.config.keep_every, self._group
        )
