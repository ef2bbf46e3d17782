"""What a recipe costs: the devices that a plan is made for, and a plan as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from .hardware import Accelerator, accelerator
from .layout import ParallelConfig
from .peak_flops import BFLOAT16

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Devices whose utilisation is assumed.

    Args:
        devices: how many.
        data_parallel: groups of devices that take rows of their own; the devices of a group share the work on them
            (tensor, context, pipeline parallel). None: every device is such a group.
        peak_flops: of one device, floating-point operations a second in the precision of training (dense).
        mfu: share of the peak that the model's own operations are expected to reach (the paper's table 4: 0.38-0.43).
    """

    devices: int = 1
    data_parallel: int | None = None
    peak_flops: float = BFLOAT16["H100"]
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if self.devices < 1 or self.peak_flops <= 0 or not 0 < self.mfu <= 1:
            raise ValueError(
                "devices must be at least 1, peak_flops above 0 and mfu in (0, 1], not "
                f"{self.devices}, {self.peak_flops:g} and {self.mfu:g}"
            )

        if self.devices % self.groups:
            raise ValueError(f"devices ({self.devices}) must be a multiple of data_parallel ({self.data_parallel})")

    @property
    def groups(self) -> int:
        return self.data_parallel or self.devices

    def days(self, flops: float) -> float:
        """How long so many operations take."""
        return flops / (self.devices * self.peak_flops * self.mfu) / SECONDS_PER_DAY


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices whose utilisation is predicted.

    Args:
        devices: how many.
        name: of the accelerator, see `hardware.ACCELERATORS`.
        parallel: the layout. None: the fastest that fit are looked for.
    """

    devices: int
    name: str = "h100"
    parallel: ParallelConfig | None = None

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1, not {self.devices}")
        accelerator(self.name)

    @property
    def device(self) -> Accelerator:
        return accelerator(self.name)


def as_text(plan: dict[str, Any], hardware: Hardware | Cluster) -> str:
    """A plan for people."""
    lines = [f"{plan['parameters']['total']:,} parameters, {plan['steps']:,} updates, {plan['tokens']:,} tokens"]
    for phase in plan["phases"]:
        lines.append(
            f"  from update {phase['from_step']:,}: {phase['steps']:,} updates of {phase['batch_size']:,} rows of "
            f"{phase['row_length']:,} = {phase['tokens']:,} tokens, {phase['flops']:.3g} FLOPs"
        )
        if isinstance(hardware, Cluster):
            lines += _layouts(phase, hardware)
    if isinstance(hardware, Hardware):
        lines.append(
            f"{plan['flops']:.4g} FLOPs: {plan['days']:.3g} days on {hardware.devices:,} devices of "
            f"{hardware.peak_flops / 1e12:g} TFLOP/s at {hardware.mfu:.0%} of it"
        )
        lines.append("memory of a device, estimated, in GB:")
        lines += [f"  {name:<13}{size / 1e9:10.2f}" for name, size in plan["memory_bytes"].items()]
        return "\n".join(lines)
    said = "some updates have no layout" if plan["days"] is None else f"{plan['days']:.3g} days"
    lines.append(f"{plan['flops']:.4g} FLOPs: {said} on {hardware.devices:,} x {hardware.name}")
    return "\n".join(lines)


def _layouts(phase: dict[str, Any], cluster: Cluster) -> list[str]:
    lines = []
    for i, found in enumerate(phase["layouts"]):
        parallel, places = found["parallel"], found["memory_bytes"]
        memory = max(parts["total"] for parts in places.values())
        fits = "" if found["fits"] else f" of {cluster.device.memory_bytes / 2**30:.0f}: DOES NOT FIT"
        degrees = " ".join(f"{name} {parallel[name]}" for name in ("tensor", "context", "pipeline", "shard"))
        lines.append(
            f"    {degrees} replicate {found['replicate']}, {found['accumulate']} micro-batches, recompute "
            f"{parallel['recompute']}: {found['step_seconds']:.3g} s, MFU {found['mfu']:.1%}, "
            f"{found['tokens_per_second']:,.0f} tokens/s a device, {memory / 2**30:.1f} GiB{fits}"
        )
        if i == 0:
            lines += [f"      {line}" for line in _details(found)]
    if phase["layouts"]:
        best = phase["layouts"][0]
        block = yaml.safe_dump(best["parallel"], default_flow_style=True, sort_keys=False, width=1000).strip()
        lines.append(f"    parallel: {block}  # with accumulate: {best['accumulate']}")
    for key, refused in phase.get("refused", {}).items():
        lines.append(f"    refused for {key}: {refused['count']:,}, such as: {refused['example']}")
    return lines


def _details(found: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {seconds / found['step_seconds']:.1%}" for name, seconds in found["seconds"].items())
    traffic = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in found["traffic_bytes"].items())
    lines = [f"time: {parts} (pipeline bubble {found['bubble']:.3f})", f"received in an update: {traffic}"]
    for place, parts in found["memory_bytes"].items():
        sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        lines.append(f"memory at pipeline place {place}, GiB: {sizes}")
    return lines
