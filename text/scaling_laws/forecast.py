"""From training compute to accuracy on a benchmark in two steps, on plain numbers (section 3.2.1 of the paper):

1. the NLL per character of the correct answer is linear in the logarithm of the training FLOPs, fitted on the
   compute-optimal models of the sweep alone;
2. accuracy is a sigmoid of that NLL, fitted on these and on further models, which may have had other data and another
   tokenizer: hence NLL per character.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .fit import Interval, ScalingLawError, interval


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model on a benchmark.

    Args:
        nll: mean over the questions of -ln p(correct answer) / characters of the answer.
        accuracy: part of the questions answered right.
        flops: training compute; None for a model outside the sweep.
        name: of the model.
    """

    nll: float
    accuracy: float
    flops: float | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """nll = intercept + slope log10(flops)."""

    slope: float
    intercept: float

    def __call__(self, flops: float) -> float:
        return self.intercept + self.slope * math.log10(flops)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """accuracy = chance + (1 - chance) / (1 + exp((nll - midpoint) / width)). The paper says sigmoid and no more;
    that it runs from chance to 1 is ours."""

    midpoint: float
    width: float
    chance: float

    def __call__(self, nll: float) -> float:
        return self.chance + (1 - self.chance) * float(_logistic((self.midpoint - nll) / self.width))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Accuracy to be expected of a compute-optimal model, with 95% intervals (None without residuals)."""

    flops: float
    nll: float
    accuracy: float
    nll_interval: Interval | None
    accuracy_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Both fits, and those of a bootstrap of their residuals."""

    line: Line
    sigmoid: Sigmoid
    resampled: tuple[tuple[Line, Sigmoid], ...] = field(repr=False)

    def predict(self, flops: float) -> Forecast:
        nlls = [line(flops) for line, _ in self.resampled]
        accuracies = [sigmoid(nll) for nll, (_, sigmoid) in zip(nlls, self.resampled, strict=True)]
        nll = self.line(flops)
        return Forecast(
            flops=flops,
            nll=nll,
            accuracy=self.sigmoid(nll),
            nll_interval=interval(np.array(nlls)),
            accuracy_interval=interval(np.array(accuracies)),
        )


def fit_forecast(
    optimal: Sequence[Scored], others: Sequence[Scored], chance: float, resamples: int = 200, seed: int = 0
) -> Forecaster:
    """
    Args:
        optimal: the best model of each budget, for both steps.
        others: further models, for the second step.
        chance: accuracy of guessing, the floor of the sigmoid.

    Raises:
        ScalingLawError: too few models, or accuracies that do not fall with the NLL.
    """
    x = np.array([math.log10(model.flops) for model in optimal if model.flops is not None])
    if len(x) < len(optimal):
        raise ScalingLawError("a model of the sweep has no training FLOPs")
    if len(set(x)) < 2:
        raise ScalingLawError(f"the line from FLOPs to NLL needs models of 2 budgets, not {len(set(x))}")
    y = np.array([model.nll for model in optimal])
    nll = np.array([model.nll for model in (*optimal, *others)])
    accuracy = np.array([model.accuracy for model in (*optimal, *others)])
    line, sigmoid = _line(x, y), fit_sigmoid(nll, accuracy, chance)
    fitted_y = np.array([line.intercept + line.slope * value for value in x])
    fitted_accuracy = np.array([sigmoid(value) for value in nll])
    resampled = []
    if len(x) > 2 and len(nll) > 2:
        rng = np.random.default_rng(seed)
        noise = (y - fitted_y) * math.sqrt(len(x) / (len(x) - 2))
        spread = (accuracy - fitted_accuracy) * math.sqrt(len(nll) / (len(nll) - 2))
        for _ in range(resamples):
            drawn = np.clip(fitted_accuracy + rng.choice(spread, len(nll)), 0, 1)
            again = _line(x, fitted_y + rng.choice(noise, len(x)))
            try:
                resampled.append((again, fit_sigmoid(nll, drawn, chance)))
            except ScalingLawError:  # no sigmoid fits this resample; the others still show the spread
                continue
    return Forecaster(line=line, sigmoid=sigmoid, resampled=tuple(resampled))


def _line(x: np.ndarray, y: np.ndarray) -> Line:
    slope, intercept = np.polyfit(x, y, 1)
    return Line(slope=float(slope), intercept=float(intercept))


def fit_sigmoid(nll: np.ndarray, accuracy: np.ndarray, chance: float) -> Sigmoid:
    """Least squares in the accuracy, by Gauss-Newton with Levenberg's damping.

    Args:
        nll, accuracy: (n,).

    Raises:
        ScalingLawError: fewer than two models of different NLL, or accuracies that do not rise above chance as the
            NLL falls.
    """
    if len(np.unique(nll)) < 2:
        raise ScalingLawError(f"the sigmoid needs 2 models of different NLL, not {len(np.unique(nll))}")
    share = np.clip((accuracy - chance) / (1 - chance), 0.01, 0.99)
    slope, intercept = np.polyfit(nll, np.log(share / (1 - share)), 1)
    if slope * np.ptp(nll) > -1e-6:  # a level line, to rounding, is none either
        raise ScalingLawError(
            "accuracies do not rise as the NLL of the correct answer falls "
            f"(NLL {_list(nll)}, accuracy {_list(accuracy)}, chance {chance:.3g}): no sigmoid to fit"
        )
    # The slope is kept as its logarithm, so that no step can turn the sigmoid round.
    at, damping = np.array([math.log(-slope), -intercept / slope]), 1e-3
    error, jacobian = _misfit(at, nll, accuracy, chance)
    for _ in range(200):
        gradient, hessian = jacobian.T @ error, jacobian.T @ jacobian
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian) + 1e-12), gradient)
        ahead = at - step
        if abs(ahead[0] - at[0]) > 2:  # a step too far out would overflow; damp it instead
            damping *= 10
            continue
        new_error, new_jacobian = _misfit(ahead, nll, accuracy, chance)
        if new_error @ new_error > error @ error:
            damping *= 10
            if damping > 1e12:
                break
            continue
        at, error, jacobian, damping = ahead, new_error, new_jacobian, damping / 10
        if np.abs(step).max() < 1e-10:
            break
    return Sigmoid(midpoint=float(at[1]), width=math.exp(-at[0]), chance=chance)


def _misfit(at: np.ndarray, nll: np.ndarray, accuracy: np.ndarray, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors (n,) and their derivatives (n, 2) by (ln of the slope, midpoint)."""
    slope = math.exp(at[0])
    share = _logistic(slope * (at[1] - nll))
    steep = (1 - chance) * share * (1 - share) * slope
    error = chance + (1 - chance) * share - accuracy
    return error, np.stack([steep * (at[1] - nll), steep], axis=1)


def _logistic(x: np.ndarray | float) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
