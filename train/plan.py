"""What a recipe costs: the devices that a plan is made for, and a plan as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """
    Args:
        devices: how many.
        data_parallel: groups of devices that take rows of their own; the devices of a group share the work on them
            (tensor, context, pipeline parallel). None: every device is such a group.
        peak_flops: of one device, floating-point operations a second in the precision of training (dense).
        mfu: share of the peak that the model's own operations are expected to reach (the paper's table 4: 0.38-0.43).
    """

    devices: int = 1
    data_parallel: int | None = None
    peak_flops: float = 989e12
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


def as_text(plan: dict[str, Any], hardware: Hardware) -> str:
    """A plan for people."""
    lines = [f"{plan['parameters']['total']:,} parameters, {plan['steps']:,} updates, {plan['tokens']:,} tokens"]
    lines += [
        f"  from update {phase['from_step']:,}: {phase['steps']:,} updates of {phase['batch_size']:,} rows of "
        f"{phase['row_length']:,} = {phase['tokens']:,} tokens, {phase['flops']:.3g} FLOPs"
        for phase in plan["phases"]
    ]
    lines.append(
        f"{plan['flops']:.4g} FLOPs: {plan['days']:.3g} days on {hardware.devices:,} devices of "
        f"{hardware.peak_flops / 1e12:g} TFLOP/s at {hardware.mfu:.0%} of it"
    )
    lines.append("memory of a device, estimated, in GB:")
    lines += [f"  {name:<13}{size / 1e9:10.2f}" for name, size in plan["memory_bytes"].items()]
    return "\n".join(lines)
