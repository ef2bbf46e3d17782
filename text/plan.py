"""What a pre-training recipe will cost, before anything is rented: steps, tokens, operations, memory, days."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..train.layout import ParallelConfig
from ..train.plan import SECONDS_PER_DAY, Cluster, Hardware
from .loss import CHUNK_BYTES
from .model import Transformer, TransformerConfig
from .plan_layouts import layouts_of_phase
from .presets import preset
from .row_loader import PlannedPhase, plan_phases

if TYPE_CHECKING:
    from .long_context import LongContextRecipe
    from .pretrain import PretrainRecipe
    from .row_stage import RowRecipe


@dataclass(frozen=True)
class PhaseCost:
    """Updates of one row length and batch size. FLOPs are those of training: three times the forward pass."""

    from_step: int
    steps: int
    row_length: int
    batch_size: int
    tokens: int
    flops: float


def plan_pretraining(recipe: PretrainRecipe, hardware: Hardware | Cluster, model: str | None = None) -> dict[str, Any]:
    """The cost of initial pre-training; see `plan_rows`.

    Args:
        model: a preset to take in place of the recipe's sizes.
    """
    config = preset(model) if model else recipe.model
    return plan_rows(config, _phases_with_steps(recipe), recipe.trainer.precision, _with_layout(hardware, recipe))


def plan_continued(recipe: RowRecipe, hardware: Hardware | Cluster, model: str | None = None) -> dict[str, Any]:
    """The cost of a stage that goes on with a model; see `plan_rows`.

    Args:
        model: the preset that the stage's `init` will be.
    """
    hardware = _with_layout(hardware, recipe)
    return plan_rows(_stated(model), _phases_with_steps(recipe), recipe.trainer.precision, hardware)


def plan_lengths(recipe: LongContextRecipe, hardware: Hardware | Cluster, model: str | None = None) -> dict[str, Any]:
    """The cost of long-context pre-training where every length takes one round; arguments as for `plan_continued`."""
    stages, step = [], 0
    for length in recipe.lengths:
        phase = PlannedPhase(step, length.row_length, length.batch_size, length.accumulate, {})
        stages.append((phase, length.steps))
        step += length.steps
    return plan_rows(_stated(model), stages, recipe.trainer.precision, _with_layout(hardware, recipe))


def _with_layout(hardware: Hardware | Cluster, recipe: RowRecipe) -> Hardware | Cluster:
    """The recipe's layout is planned where it has one and the caller names none."""
    given = recipe.parallel != ParallelConfig()
    if isinstance(hardware, Cluster) and hardware.parallel is None and given:
        return replace(hardware, parallel=recipe.parallel)
    return hardware


def _stated(model: str | None) -> TransformerConfig:
    if model is None:
        raise ValueError("this stage goes on with a model that need not be there yet: say which with --model PRESET")
    return preset(model)


def _phases_with_steps(recipe: RowRecipe) -> list[tuple[PlannedPhase, int]]:
    phases = plan_phases(recipe.phases, recipe.trainer, recipe.data)
    steps = recipe.trainer.steps
    ends = [*(phase.from_step for phase in phases[1:]), steps]
    return [(phase, max(0, min(end, steps) - phase.from_step)) for phase, end in zip(phases, ends, strict=True)]


def plan_rows(
    config: TransformerConfig,
    phases: Sequence[tuple[PlannedPhase, int]],
    precision: str,
    hardware: Hardware | Cluster,
) -> dict[str, Any]:
    """The cost of training a language model on rows.

    FLOPs count each multiply-add as two, attention at half the row (causal, as if no row were packed), and no
    recomputation.

    Args:
        phases: and how many updates each has.
        precision: as in `TrainerConfig`.

    Returns: plain JSON values: "parameters" by kind, "phases", "steps", "tokens", "flops", "days", and what `_assumed`
        or `_predicted` adds for that hardware.

    Raises:
        ValueError: a batch does not divide among the groups of devices, or the layout does not fit the model.
    """
    with torch.device("meta"):
        model = Transformer(config)
    costs = []
    for phase, steps in phases:
        tokens = steps * phase.tokens_per_step
        flops = 3.0 * tokens * model.flops_per_token(phase.row_length / 2)
        costs.append(PhaseCost(phase.from_step, steps, phase.row_length, phase.batch_size, tokens, flops))
    plan = {
        "parameters": model.parameter_table(),
        "phases": [asdict(cost) for cost in costs],
        "steps": sum(cost.steps for cost in costs),
        "tokens": sum(cost.tokens for cost in costs),
        "flops": sum(cost.flops for cost in costs),
    }
    if isinstance(hardware, Cluster):
        return _predicted(plan, config, phases, precision, hardware)
    return _assumed(plan, config, phases, precision, hardware)


def _assumed(
    plan: dict[str, Any],
    config: TransformerConfig,
    phases: Sequence[tuple[PlannedPhase, int]],
    precision: str,
    hardware: Hardware,
) -> dict[str, Any]:
    """Days at an assumed utilisation, with weights, gradients and moments sharded over all devices.

    "memory_bytes" is an estimate for one device, by what takes it: weights, gradients and moments in float32, the
    largest layer gathered in the precision of training (on one device a copy of all weights, where that is not
    float32), and the activations of one micro-batch (see `activation_bytes`), shared evenly in its group of devices,
    without what the libraries and the allocator take for themselves.
    """
    table = plan["parameters"]
    width = 2 if precision == "bfloat16" else 4
    rows = [phase.micro_batch_size(hardware.groups) * phase.row_length for phase, _ in phases]
    micro = max(rows) * hardware.groups / hardware.devices
    layer = (table["attention"] + table["feed_forward"]) // config.n_layers
    sharded = table["total"] / hardware.devices
    working = table["total"] if width < 4 else 0
    memory = {
        "weights": 4 * sharded,
        "gradients": 4 * sharded,
        "moments": 8 * sharded,
        "working_copy": width * (max(layer, table["embeddings"]) if hardware.devices > 1 else working),
        "activations": micro * activation_bytes(config, width),
        "logits": 2 * min(CHUNK_BYTES, 4 * micro * config.vocab_size),
    }
    memory["total"] = sum(memory.values())
    return plan | {
        "days": hardware.days(plan["flops"]),
        "memory_bytes": {name: round(value) for name, value in memory.items()},
    }


def _predicted(
    plan: dict[str, Any],
    config: TransformerConfig,
    phases: Sequence[tuple[PlannedPhase, int]],
    precision: str,
    cluster: Cluster,
) -> dict[str, Any]:
    """Each phase with its "layouts", the fastest first, and those "refused" (see `layouts_of_phase`); "days" with the
    first of each, None where a phase has none."""
    if precision == "float32":
        raise ValueError("trainer.precision float32: accelerators are known by their bfloat16 speed; plan for bfloat16")
    found = [layouts_of_phase(config, phase, cluster) for phase, _ in phases]
    seconds = [
        steps * each["layouts"][0]["step_seconds"]
        for each, (_, steps) in zip(found, phases, strict=True)
        if each["layouts"]
    ]
    return plan | {
        "phases": [cost | each for cost, each in zip(plan["phases"], found, strict=True)],
        "days": sum(seconds) / SECONDS_PER_DAY if len(seconds) == len(found) else None,
    }


def activation_bytes(config: TransformerConfig, width: int) -> int:
    """Bytes that one position leaves for the backward pass, without recomputation.

    Of every layer: the residual stream before each of the two norms, in float32, and what the norms make of it; queries
    and keys after rotation, values, what attention gives, twice (the kernel's layout and the projection's); the three
    products inside the feed-forward and the gate.

    Args:
        width: bytes of a number in the precision of training.
    """
    kv = config.n_kv_heads * config.head_dim
    stream = 2 * (4 + width) * config.dim
    attention = width * (3 * config.dim + 2 * kv)
    feed_forward = 4 * width * config.ffn_dim
    return config.n_layers * (stream + attention + feed_forward) + (4 + width) * config.dim
