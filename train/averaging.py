"""The mean of a run's checkpoints (Polyak averaging, section 3.4.3)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from .checkpoint import CheckpointError


@torch.no_grad()
def average_checkpoints(model: nn.Module, run_dir: Path, count: int) -> list[int]:
    """Puts the mean of a run's newest checkpoints into its model, in place.

    Args:
        model: of the run; parameters that were never trained stay as they are. A second copy of the trained ones is
            held meanwhile.
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
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for number, path in enumerate(paths):
        if damage := checkpoint.find_damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}")
        names = [name for name in checkpoint.describe_tensors(path) if name.startswith("model.")]
        if absent := [name for name in names if name not in parameters]:
            raise CheckpointError(f"checkpoint {path} does not fit: the model has no {', '.join(absent[:8])}")
        stored = {name: torch.empty_like(parameters[name]) for name in names}
        checkpoint.load_tensors(path, stored)
        for name, tensor in stored.items():
            parameters[name].lerp_(tensor, 1 / (number + 1))
    return [checkpoint.step_of(path) for path in paths]
