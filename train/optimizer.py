"""AdamW over named groups of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .config import OptimizerConfig
from .freezing import parameter_names, require_matches


def build_optimizer(model: nn.Module, trained: Sequence[str], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the named parameters, in groups of one `lr_scale`, `weight_decay` and device mesh each.

    Parameters of fewer than two dimensions (norms, gates, biases) are not decayed unless a rule that matches
    them says so. A parameter without a gradient is neither moved nor decayed by a step.

    Raises:
        ValueError: a group rule matches no parameter of the model, or a parameter's precision is below
            float32, in which sums of gradients and small updates would be lost.
    """
    names = parameter_names(model)
    require_matches((rule.pattern for rule in config.groups), names, "optimizer group")
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float, DeviceMesh | None], list[nn.Parameter]] = {}
    for name in trained:
        parameter = parameters[name]
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name} is {parameter.dtype} but is to be trained: make it float32, and set "
                "precision to bfloat16 for fast compute"
            )
        scale, decay = 1.0, config.weight_decay if parameter.ndim >= 2 else 0.0
        matching = [r for r in config.groups if any(fnmatchcase(alias, r.pattern) for alias in names[name])]
        if matching:
            scale = matching[-1].lr_scale
            decay = decay if matching[-1].weight_decay is None else matching[-1].weight_decay
        # One fused step takes tensors of one mesh.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((scale, decay, mesh), []).append(parameter)
    if not groups:  # what this stage of a pipeline has is frozen
        groups[1.0, 0.0, None] = []
    return torch.optim.AdamW(
        [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay, _), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group to `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
