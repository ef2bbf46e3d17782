"""What interruptions leave of a training run: its expected effective training time (section 3.3.4 of the paper).

    from herdkit.train.interruptions import Reliability, simulate

    plan = Reliability.of_the_paper()
    plan.effective_time()               # by formula
    simulate(plan, days=54, runs=100)   # the same with its spread, by drawing interruptions
    plan.with_devices(131_072).with_best_interval().effective_time()

`EffectiveTime` measures the same of a run that was made. All times are in seconds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

from .plan import SECONDS_PER_DAY

LARGEST_EXPONENT = 700.0  # of a double


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A run of any length, in which interruptions come independently of each other and of its age (exponential gaps).

    An unplanned interruption loses the training since the last whole checkpoint, and nothing more happens until it is
    detected. A planned one is announced: a checkpoint is made, or finished, and nothing is lost. Then comes a restart;
    every interruption in it begins it anew. A checkpoint is whole once its stall is over.

    Args:
        devices: of the job.
        unplanned, planned: mean time between interruptions of the whole job; `math.inf`: there are none.
        interval: of training from checkpoint to checkpoint.
        stall: that training stands still for a checkpoint.
        detection: from an unplanned interruption to the start of the restart.
        restart: until the next update begins: scheduling, initialisation, reading the checkpoint.
    """

    devices: int
    unplanned: float
    planned: float = math.inf
    interval: float
    stall: float
    detection: float
    restart: float

    def __post_init__(self) -> None:
        for name in ("devices", "unplanned", "planned", "interval"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("stall", "detection", "restart"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if math.isinf(self.interval):
            raise ValueError("interval must be finite: without any checkpoint no interrupted run ends")

    @classmethod
    def of_the_paper(
        cls, *, interval: float = 900.0, stall: float = 10.0, detection: float = 120.0, restart: float = 300.0
    ) -> Reliability:
        """419 unplanned and 47 planned interruptions of 16,384 GPUs in 54 days. The paper gives none of the arguments;
        the defaults are ours, plausible ones. For the stall: to write 405B parameters with master weights and moments,
        14 bytes each, takes 3 s at the 2 TB/s of the paper's storage."""
        window = 54 * SECONDS_PER_DAY
        return cls(
            devices=16_384,
            unplanned=window / 419,
            planned=window / 47,
            interval=interval,
            stall=stall,
            detection=detection,
            restart=restart,
        )

    @property
    def rate(self) -> float:
        """Interruptions of both kinds a second."""
        return 1 / self.unplanned + 1 / self.planned

    def with_devices(self, devices: int) -> Reliability:
        """As many interruptions for each device; times of checkpoints and restarts stay."""
        scale = self.devices / devices
        return replace(self, devices=devices, unplanned=self.unplanned * scale, planned=self.planned * scale)

    def with_best_interval(self) -> Reliability:
        """The interval of `daly_interval`. It needs unplanned interruptions, and checkpoints that cost something."""
        return replace(self, interval=daly_interval(self.stall, self.unplanned))

    def effective_time(self) -> float:
        """Expected share of the time of a long run that is training and not lost, in [0, 1].

        Exact for what the class describes: a run begins anew at every whole checkpoint and every restart, so that the
        share is that of the expected useful and elapsed time from one such moment to the next. Without planned
        interruptions it is Daly's: interval / (unplanned * exp(restart / unplanned) * (exp((interval + stall) /
        unplanned) - 1)), with the detection beside.
        """
        train, pause, rate = self.interval, self.stall, self.rate
        if rate == 0:
            return train / (train + pause)
        if rate * self.restart > LARGEST_EXPONENT:
            return 0.0
        announced = 1 / self.planned
        # Of every checkpoint interval: the chance to get through its training, and through its checkpoint too.
        trained, saved = math.exp(-rate * train), math.exp(-rate * (train + pause))
        up = -math.expm1(-rate * (train + pause)) / rate
        before_announced = (1 - trained * (1 + rate * train)) / rate**2 + train * (trained - saved) / rate
        useful = train * saved + announced * before_announced
        # Of an announced checkpoint: all of it, or the rest of the one that is being made.
        rest = trained * (rate * pause + math.expm1(-rate * pause)) / rate**2
        extra = announced * (pause * (1 - trained) / rate + rest)
        down = math.expm1(rate * self.restart) / rate * (1 + self.detection / self.unplanned)
        return useful / (up + extra + up / self.unplanned * self.detection + up * rate * down)


def young_interval(stall: float, between: float) -> float:
    """The best time between checkpoints to first order: sqrt(2 stall between) (Young 1974).

    Args:
        between: mean time between the interruptions that lose work.
    """
    return math.sqrt(2 * stall * between)


def daly_interval(stall: float, between: float) -> float:
    """The same to higher order, good for checkpoints that are not short beside `between` too (Daly 2006)."""
    if stall >= 2 * between:
        return between
    share = math.sqrt(stall / (2 * between)) if between < math.inf else 0.0
    return young_interval(stall, between) * (1 + share / 3 + share**2 / 9) - stall


class Simulated(NamedTuple):
    """`effective_time` is the mean over the runs, `spread` the standard deviation from run to run, `error` the standard
    error of the mean, `interruptions` the mean number in a run, of both kinds."""

    effective_time: float
    spread: float
    error: float
    interruptions: float


def simulate(plan: Reliability, days: float, *, runs: int = 100, seed: int = 0) -> Simulated:
    """Draws the interruptions of `runs` runs of so many days each. Training since the last checkpoint counts at the end
    of a run."""
    if not days > 0 or runs < 2:
        raise ValueError(f"days must be above 0 and runs at least 2, not {days} and {runs}")
    random = Random(seed)
    made = [_run(plan, days * SECONDS_PER_DAY, random) for _ in range(runs)]
    shares = [useful / (days * SECONDS_PER_DAY) for useful, _ in made]
    spread = statistics.stdev(shares)
    return Simulated(
        effective_time=statistics.fmean(shares),
        spread=spread,
        error=spread / math.sqrt(runs),
        interruptions=statistics.fmean(number for _, number in made),
    )


def _run(plan: Reliability, length: float, random: Random) -> tuple[float, int]:
    """(useful seconds, interruptions) of one run."""
    period = plan.interval + plan.stall
    clock, useful, interruptions = 0.0, 0.0, 0
    training = True
    while clock < length:
        # Gaps have no memory: at the end of a restart the next one is drawn anew.
        gap = random.expovariate(plan.rate) if plan.rate else math.inf
        planned = random.random() * plan.rate < 1 / plan.planned
        if not training and gap >= plan.restart:
            clock += plan.restart
            training = True
            continue
        ended = clock + gap >= length
        finishing = 0.0
        if training:
            whole, rest = divmod(min(gap, length - clock), period)
            useful += whole * plan.interval + (min(rest, plan.interval) if planned or ended else 0.0)
            finishing = min(plan.stall, period - rest)
        if ended:
            break
        clock += gap + (finishing if planned else plan.detection)
        interruptions += 1
        training = False
    return useful, interruptions
