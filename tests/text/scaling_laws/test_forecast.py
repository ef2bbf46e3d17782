import math

import numpy as np
import pytest
from herdkit.text.scaling_laws import ScalingLawError, Scored, fit_forecast, fit_sigmoid

CHANCE, MIDPOINT, WIDTH = 0.25, 0.9, 0.08


def planted(nll):
    return CHANCE + (1 - CHANCE) / (1 + math.exp((nll - MIDPOINT) / WIDTH))


def models(flops, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    nlls = [3.1 - 0.1 * math.log10(c) + noise * rng.standard_normal() for c in flops]
    return [
        Scored(nll=nll, accuracy=planted(nll) + noise * rng.standard_normal(), flops=c)
        for nll, c in zip(nlls, flops, strict=True)
    ]


def test_planted_forecast_is_recovered():
    sweep = models(np.geomspace(6e18, 1e22, 10))
    others = [Scored(nll=nll, accuracy=planted(nll)) for nll in (0.85, 0.75, 0.65)]
    fits = fit_forecast(sweep, others, CHANCE, resamples=5)
    assert fits.line.slope == pytest.approx(-0.1)
    assert (fits.sigmoid.midpoint, fits.sigmoid.width) == pytest.approx((MIDPOINT, WIDTH), rel=1e-6)
    forecast = fits.predict(3.8e25)
    nll = 3.1 - 0.1 * math.log10(3.8e25)
    assert (forecast.nll, forecast.accuracy) == pytest.approx((nll, planted(nll)))


def test_intervals_cover_the_truth_four_orders_of_magnitude_away():
    others = [Scored(nll=nll, accuracy=planted(nll)) for nll in (0.85, 0.75, 0.65)]
    nll, held = 3.1 - 0.1 * math.log10(1e26), 0
    for seed in range(15):
        sweep = models(np.geomspace(6e18, 1e22, 10), noise=0.01, seed=seed)
        low, high = fit_forecast(sweep, others, CHANCE, resamples=50).predict(1e26).accuracy_interval
        held += low <= planted(nll) <= high
    assert held >= 11


def test_the_sigmoid_is_the_least_squares_one():
    rng = np.random.default_rng(0)
    nll = rng.uniform(0.7, 1.1, 30)
    accuracy = np.array([planted(value) for value in nll]) + 0.05 * rng.standard_normal(30)
    best = fit_sigmoid(nll, accuracy, CHANCE)

    def misfit(midpoint, width):
        fitted = CHANCE + (1 - CHANCE) / (1 + np.exp((nll - midpoint) / width))
        return ((fitted - accuracy) ** 2).sum()

    least = misfit(best.midpoint, best.width)
    for step in (1e-3, -1e-3):
        assert misfit(best.midpoint + step, best.width) > least
        assert misfit(best.midpoint, best.width * (1 + step)) > least


@pytest.mark.parametrize(
    ("nll", "accuracy", "says"),
    [
        ([1.0, 0.9, 0.8], [0.5, 0.4, 0.3], "do not rise"),
        ([1.0, 0.9, 0.8], [0.25, 0.25, 0.25], "do not rise"),
        ([1.0, 1.0], [0.3, 0.4], "2 models of different NLL, not 1"),
    ],
)
def test_what_shows_no_sigmoid_is_refused(nll, accuracy, says):
    with pytest.raises(ScalingLawError, match=says):
        fit_sigmoid(np.array(nll), np.array(accuracy), CHANCE)


def test_a_line_needs_two_budgets():
    with pytest.raises(ScalingLawError, match="2 budgets, not 1"):
        fit_forecast([Scored(nll=1.0, accuracy=0.4, flops=1e18)], [], CHANCE)
