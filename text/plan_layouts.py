"""What a layout costs in one phase of training, and which layouts cost least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ..train.hardware import Accelerator
from ..train.layout import Layout, LayoutError, ParallelConfig, bubble, lay_out
from ..train.plan import Cluster
from .model import TransformerConfig
from .parallel import Share, require_fits, shares
from .plan_memory import Load, memory_bytes
from .plan_time import flops_per_token, step_time
from .row_loader import PlannedPhase

SHOWN = 5
"""Layouts of a ranking, at most one for the same degrees."""

WIDTH = 2
"""Bytes of a bfloat16."""


def layouts_of_phase(config: TransformerConfig, phase: PlannedPhase, cluster: Cluster) -> dict[str, Any]:
    """What the cluster's layout costs with the micro-batches of the recipe, or, where none is given, the fastest ones
    with the micro-batches that suit them.

    Returns: "layouts", fastest first, see `cost`; and of a search "refused": by the field of `ParallelConfig` that
        stands in the way, or "memory", how many, and an example; for memory the one that lacks least.

    Raises:
        ValueError: the given layout does not divide the devices, the model, the rows or the batch.
    """
    if cluster.parallel is not None:
        return {"layouts": [cost(config, phase, cluster.devices, cluster.device, cluster.parallel)]}
    return _rank(config, phase, cluster)


def cost(
    config: TransformerConfig, phase: PlannedPhase, devices: int, device: Accelerator, parallel: ParallelConfig
) -> dict[str, Any]:
    """One layout as plain JSON values: "parallel", "replicate", "accumulate", "step_seconds", "tokens_per_second" of a
    device, "mfu" (see `flops_per_token`), "bubble", "seconds" and "traffic_bytes" by kind, "memory_bytes" by place in
    the pipeline (places that are like one before are left out) and kind, and whether that "fits".

    Raises:
        ValueError: see `layouts_of_phase`.
    """
    layout = lay_out(parallel, devices)
    if layout.storage == 1:  # nothing is gathered
        parallel = dataclasses.replace(parallel, gather="float32")
    require_fits(config, layout, phase.row_length)
    load = Load(
        row_length=phase.row_length,
        rows=phase.micro_batch_size(layout.data),
        micro_batches=phase.accumulate,
        width=WIDTH,
    )
    owners = shares(config, parallel, layout)
    memory = _memory(config, parallel, layout, load, owners)
    time = step_time(config, parallel, layout, load, device, list(owners.values()))
    speed = phase.tokens_per_step / devices / time.total
    return {
        "parallel": dataclasses.asdict(parallel),
        "replicate": layout.replicate,
        "accumulate": phase.accumulate,
        "step_seconds": time.total,
        "tokens_per_second": speed,
        "mfu": speed * flops_per_token(config, phase.row_length) / device.peak_flops,
        "bubble": bubble(parallel, phase.accumulate),
        "seconds": time.seconds(),
        "traffic_bytes": {"server": time.server_bytes, "network": time.network_bytes},
        "memory_bytes": memory,
        "fits": _most(memory) <= device.memory_bytes,
    }


Memory = dict[int, dict[str, int]]


def _memory(
    config: TransformerConfig,
    parallel: ParallelConfig,
    layout: Layout,
    load: Load,
    owners: dict[int, Share],
) -> Memory:
    return {place: memory_bytes(config, parallel, layout, load, place, share) for place, share in owners.items()}


def _most(memory: Memory) -> int:
    return max(parts["total"] for parts in memory.values())


class _Refusals:
    """How many layouts fail for what, with an example of each."""

    def __init__(self):
        self.by_key: dict[str, dict[str, Any]] = {}
        self.least = math.inf

    def add(self, key: str, example: str) -> None:
        self.by_key.setdefault(key, {"count": 0, "example": example})["count"] += 1

    def add_memory(self, needed: int, device: Accelerator, parallel: ParallelConfig, accumulate: int) -> None:
        """The example is what lacks least."""
        said = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(parallel).items() if value)
        example = (
            f"{needed / 2**30:.1f} of {device.memory_bytes / 2**30:.1f} GiB with {accumulate} micro-batches, {said}"
        )
        self.add("memory", example)
        if needed < self.least:
            self.least, self.by_key["memory"]["example"] = needed, example


def _rank(config: TransformerConfig, phase: PlannedPhase, cluster: Cluster) -> dict[str, Any]:
    best: dict[tuple[int, ...], tuple[float, ParallelConfig, int]] = {}
    refused = _Refusals()
    for degrees in _degrees(config, cluster.devices, cluster.device):
        try:
            layout = lay_out(degrees, cluster.devices)
            require_fits(config, layout, phase.row_length)
            rows, rest = divmod(phase.batch_size, layout.data)
            if rest:
                raise LayoutError(
                    "shard",
                    f"batch_size {phase.batch_size} is not a multiple of shard x replicate = {layout.shard} x "
                    f"{layout.replicate}",
                )
            ways = list(_fastest(config, phase, cluster.device, degrees, layout, rows, refused))
        except LayoutError as error:
            refused.add(error.key, str(error))
            continue
        if ways:
            best[layout.degrees] = min(ways, key=lambda way: way[0])
    first = sorted(best.values(), key=lambda way: way[0])[:SHOWN]
    layouts = [
        cost(config, dataclasses.replace(phase, accumulate=count), cluster.devices, cluster.device, parallel)
        for _, parallel, count in first
    ]
    return {"layouts": layouts, "refused": refused.by_key}


def _degrees(config: TransformerConfig, devices: int, device: Accelerator) -> Iterator[ParallelConfig]:
    """Degrees to try: a tensor within a server, FSDP over all that are left, or over about 8, 64 or 512."""
    for tensor in _divisors(devices, device.per_server):
        for context in _divisors(devices // tensor, 64):
            left = devices // tensor // context
            for pipeline in _divisors(left, config.n_layers + 2):
                data = left // pipeline
                for shard in sorted({data, *(_divisors(data, most)[-1] for most in (8, 64, 512))}):
                    # What is planned is bfloat16 (see `plan_rows`), which weights can be gathered in.
                    yield ParallelConfig(
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        shard=shard,
                        compile="inductor",
                        gather="bfloat16" if context * shard > 1 else "float32",
                    )


def _fastest(
    config: TransformerConfig,
    phase: PlannedPhase,
    device: Accelerator,
    degrees: ParallelConfig,
    layout: Layout,
    rows: int,
    refused: _Refusals,
) -> Iterator[tuple[float, ParallelConfig, int]]:
    """Seconds, layout and micro-batches of all schedules and sizes of a micro-batch, each with the least recomputation
    that fits.

    Args:
        rows: of a group of data parallel in an update.
    """
    deepest = (config.n_layers + 2) // layout.pipeline
    chunks = {1} if layout.pipeline == 1 else {1, *(n for n in (2, 4, 8, deepest) if 1 < n <= deepest)}
    for count in sorted(chunks):
        way = dataclasses.replace(degrees, schedule="interleaved" if count > 1 else "1f1b", chunks=count)
        owners = shares(config, way, layout)
        for size in _divisors(rows, 16):
            load = Load(row_length=phase.row_length, rows=size, micro_batches=rows // size, width=WIDTH)
            fitting = _least_recomputation(config, device, way, layout, load, owners, refused)
            for parallel in fitting:
                time = step_time(config, parallel, layout, load, device, list(owners.values()))
                yield time.total, parallel, load.micro_batches
            if not fitting:
                break


def _least_recomputation(
    config: TransformerConfig,
    device: Accelerator,
    way: ParallelConfig,
    layout: Layout,
    load: Load,
    owners: dict[int, Share],
    refused: _Refusals,
) -> list[ParallelConfig]:
    """With weights kept and, on one stage, re-sharded; none where nothing fits."""
    needed, parallel = 0, way
    for recompute in ("none", "selective", "full"):
        fitting = []
        for reshard in (False, True) if layout.pipeline == 1 and layout.storage > 1 else (False,):
            parallel = dataclasses.replace(way, recompute=recompute, reshard=reshard)
            needed = _most(_memory(config, parallel, layout, load, owners))
            if needed <= device.memory_bytes:
                fitting.append(parallel)
        if fitting:
            return fitting
    refused.add_memory(needed, device, parallel, load.micro_batches)
    return []


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
