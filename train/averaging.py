"""The mean of a run's checkpoints (Polyak averaging, section 3.4.3)."""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, parallel
from .checkpoint import CheckpointError


@torch.no_grad()
def average_checkpoints(model: nn.Module, run_dir: Path, count: int) -> list[int]:
    """Puts the mean of a run's newest checkpoints into its model, in place. All processes that share it call it.

    Args:
        model: of the run, or this process's part of it; parameters that were never trained stay as they are. A second
            copy of the trained ones is held meanwhile.
        count: how many checkpoints.

    Returns: the steps of those averaged, newest first.

    Raises:
        CheckpointError: the run keeps fewer, one is damaged, or they do not fit the model.
    """
    paths = checkpoint.list_checkpoints(run_dir)[:count]
    if len(paths) < count:
        raise CheckpointError(
            f"{run_dir} keeps {len(paths)} checkpoints and {count} are to be averaged: raise trainer.keep, or lower "
            "trainer.checkpoint_every"
        )
    parameters = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    everywhere = set(chain.from_iterable(parallel.gather(list(parameters))))
    for number, path in enumerate(paths):
        if damage := parallel.on_first(partial(checkpoint.find_damage, path)):
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}")
        names = [name for name in checkpoint.describe_tensors(path) if name.startswith("model.")]
        if absent := [name for name in names if name not in everywhere]:
            raise CheckpointError(f"checkpoint {path} does not fit: the model has no {', '.join(absent[:8])}")
        stored = {name: torch.empty_like(parameters[name]) for name in names if name in parameters}
        checkpoint.load_tensors(path, stored)
        for name, tensor in stored.items():
            parallel.local(parameters[name]).lerp_(parallel.local(tensor), 1 / (number + 1))
    return [checkpoint.step_of(path) for path in paths]
