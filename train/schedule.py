"""The learning rate as a function of the update (section 3.4.1 of the paper: linear warm-up, cosine decay;
section 3.4.3: linear to zero)."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def fraction(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of update `step` (0 is the first) of `steps`, as a fraction of the peak.

    With w = warmup_steps, f = final_fraction, and d = decay_steps (default steps - w):

    * warm-up, step < w: (step + 1) / w, so that no update is at zero;
    * then, with p = (step - w) / d, at most 1: "cosine" is f + (1 - f)(1 + cos(pi p)) / 2, "linear" is
      1 - (1 - f) p, "constant" is 1;
    * "wsd" is 1, and from update steps - d on as "linear", with p = (step - (steps - d)) / d.

    The first update of a decay is at the peak, and the last of a run is one short of the final value: with
    final_fraction 0 every update still moves.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    length = schedule.decay_steps or max(steps - schedule.warmup_steps, 1)
    start = steps - length if schedule.kind == "wsd" else schedule.warmup_steps
    progress = min(max((step - start) / length, 0.0), 1.0)
    if schedule.kind == "cosine":
        return schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    return 1 - (1 - schedule.final_fraction) * progress
