"""IsoFLOP curves and the power law of their minima, on plain numbers (section 3.2.1 of "The Llama 3 Herd of
Models", arXiv 2407.21783).

Letters: C compute budget in FLOPs, D training tokens of a run, N* compute-optimal training tokens of a budget. In the
paper's law N* counts tokens, not parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.polynomial import Polynomial

Interval = tuple[float, float]


class ScalingLawError(ValueError):
    """The measurements do not determine what is asked for; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one finished run gives to the fit.

    Args:
        budget: C, the same number for all runs of a curve.
        tokens: D.
        loss: held-out loss.
        name: of the run, for messages.
    """

    budget: float
    tokens: float
    loss: float
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("budget", "tokens"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ScalingLawError(f"run {self.name!r}: {key} must be positive, not {getattr(self, key)}")
        if not math.isfinite(self.loss):
            raise ScalingLawError(f"run {self.name!r}: the loss is {self.loss}; leave a diverged run out")


@dataclass(frozen=True, kw_only=True)
class IsoFlopCurve:
    """The runs of one budget and the parabola through them.

    Attributes:
        runs: by tokens.
        parabola: loss as a polynomial of degree 2 in ln D; None where there are too few runs for one.
        fault: why the curve has no compute-optimal point; "" where it has one.
    """

    budget: float
    runs: tuple[Measurement, ...]
    parabola: Polynomial | None
    fault: str

    @property
    def optimal_tokens(self) -> float:
        """N*, the vertex."""
        return math.exp(_vertex(self._curve))

    @property
    def optimal_loss(self) -> float:
        return float(self._curve(_vertex(self._curve)))

    @property
    def best_run(self) -> Measurement:
        return min(self.runs, key=lambda run: run.loss)

    @property
    def _curve(self) -> Polynomial:
        if self.parabola is None or self.fault:
            raise ScalingLawError(f"budget {self.budget:.3g}: {self.fault}")
        return self.parabola


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """N*(C) = A C^alpha: compute-optimal training tokens of a budget in FLOPs."""

    alpha: float
    coefficient: float
    """A. Its error is that of alpha many times over (C is far from 1), so judge a law by its predictions."""

    def tokens(self, flops: float) -> float:
        return self.coefficient * flops**self.alpha


PAPER = PowerLaw(alpha=0.537, coefficient=0.299)
"""The law in the legend of the paper's figure. The text beside it prints the pair as (0.53, 0.29), of which the second
decimals are cut off: at the flagship's 3.8e25 FLOPs that pair gives 10.46T tokens, this one 16.29T. The paper states
16.55T, so that its own constants have still more digits."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Optimum of a budget.

    Args:
        flops: C.
        tokens: N*.
        interval: 95% of the bootstrap; None where the runs leave no residuals to draw from.
    """

    flops: float
    tokens: float
    interval: Interval | None

    @property
    def parameters(self) -> float:
        """Model size by C = 6 x parameters x tokens, as the paper's scale of models is usually stated."""
        return self.flops / (6 * self.tokens)


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        curves: one for each budget, those with a `fault` had no part in the law.
        law: least squares of ln N* over ln C.
        resampled: (R, 2) alpha and ln A of the bootstrap's laws; R is 0 where there are no residuals.
        failed: the part of the resamples that left fewer than two budgets with a minimum.
    """

    curves: tuple[IsoFlopCurve, ...]
    law: PowerLaw
    resampled: np.ndarray = field(repr=False)
    failed: float

    @property
    def alpha_interval(self) -> Interval | None:
        """95% of the bootstrap."""
        return interval(self.resampled[:, 0])

    def predict(self, flops: float) -> Prediction:
        tokens = self.resampled[:, 0] * math.log(flops) + self.resampled[:, 1]
        return Prediction(flops=flops, tokens=self.law.tokens(flops), interval=interval(np.exp(tokens)))


def isoflop_curves(measurements: Iterable[Measurement]) -> list[IsoFlopCurve]:
    """The curve of every budget, smallest budget first."""
    budgets: dict[float, list[Measurement]] = {}
    for measurement in measurements:
        budgets.setdefault(measurement.budget, []).append(measurement)
    return [_curve(budget, budgets[budget]) for budget in sorted(budgets)]


def _curve(budget: float, runs: Sequence[Measurement]) -> IsoFlopCurve:
    runs = tuple(sorted(runs, key=lambda run: run.tokens))
    if (count := len({run.tokens for run in runs})) < 3:
        return IsoFlopCurve(budget=budget, runs=runs, parabola=None, fault=f"{count} run(s), and a parabola needs 3")
    x, y = (np.array([getattr(run, key) for run in runs]) for key in ("tokens", "loss"))
    parabola = Polynomial.fit(np.log(x), y, 2)
    return IsoFlopCurve(budget=budget, runs=runs, parabola=parabola, fault=_fault(parabola, runs))


def _fault(parabola: Polynomial, runs: Sequence[Measurement]) -> str:
    if parabola.convert().coef[2] <= 0:
        return "the loss has no minimum over the sizes: the parabola opens downward"
    at = math.exp(_vertex(parabola))
    best = min(runs, key=lambda run: run.loss)
    if best is runs[0] or at < runs[0].tokens:
        return "the minimum lies at the edge, at the fewest tokens: add larger sizes"
    if best is runs[-1] or at > runs[-1].tokens:
        return "the minimum lies at the edge, at the most tokens: add smaller sizes"
    return ""


def _vertex(parabola: Polynomial) -> float:
    _, slope, curvature = parabola.convert().coef
    return float(-slope / (2 * curvature))


def fit_scaling_law(measurements: Iterable[Measurement], resamples: int = 1000, seed: int = 0) -> ScalingLaw:
    """Fits a parabola to each budget and the power law to their vertices.

    The uncertainty is a bootstrap of residuals: losses are drawn anew as parabola + residual, with the residuals of
    all budgets pooled and widened by sqrt(runs / (runs - 3)), and everything is fitted again; a budget whose vertex
    leaves the range of its runs has no part in that resample, as in the fit. It covers the noise of single runs, not
    the error of taking the curves for parabolas and the law for a straight line.

    Raises:
        ScalingLawError: fewer than two budgets have a minimum within their sizes; names each and why.
    """
    curves = isoflop_curves(measurements)
    usable = [curve for curve in curves if not curve.fault]
    if len(usable) < 2:
        reasons = [f"; budget {curve.budget:.3g}: {curve.fault}" for curve in curves if curve.fault]
        raise ScalingLawError(f"a power law needs 2 budgets with a minimum, not {len(usable)}{''.join(reasons)}")
    optima = np.log([curve.optimal_tokens for curve in usable])
    budgets = np.log([curve.budget for curve in usable])
    alpha, intercept = np.polyfit(budgets, optima, 1)
    resampled, failed = _bootstrap(usable, resamples, seed)
    return ScalingLaw(
        curves=tuple(curves),
        law=PowerLaw(alpha=float(alpha), coefficient=math.exp(intercept)),
        resampled=resampled,
        failed=failed,
    )


def _bootstrap(curves: Sequence[IsoFlopCurve], resamples: int, seed: int) -> tuple[np.ndarray, float]:
    """(R, 2) alpha and ln A of resampled laws, and the part of the resamples that gave none."""
    residuals, designs = [], []
    for curve in curves:
        assert curve.parabola is not None
        x = np.log([run.tokens for run in curve.runs])
        y = np.array([run.loss for run in curve.runs])
        designs.append((x, curve.parabola(x)))
        if len(x) > 3:
            residuals.append((y - curve.parabola(x)) * math.sqrt(len(x) / (len(x) - 3)))
    if not residuals:
        return np.empty((0, 2)), 0.0
    pool = np.concatenate(residuals)
    rng = np.random.default_rng(seed)
    vertices = np.empty((resamples, len(curves)))
    for i, (x, fitted) in enumerate(designs):
        drawn = fitted + rng.choice(pool, (resamples, len(x)))
        curvature, slope, _ = np.polyfit(x - x.mean(), drawn.T, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = x.mean() - slope / (2 * curvature)
        inside = (curvature > 0) & (vertex >= x[0]) & (vertex <= x[-1])
        vertices[:, i] = np.where(inside, vertex, np.nan)
    budgets = np.log([curve.budget for curve in curves])
    laws = [np.polyfit(budgets[there], row[there], 1) for row in vertices if (there := np.isfinite(row)).sum() >= 2]
    return np.array(laws).reshape(-1, 2), 1 - len(laws) / resamples


def interval(values: np.ndarray) -> Interval | None:
    """The middle 95% of values; None of none."""
    if len(values) == 0:
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
