"""Fits of planted laws whose optimum is known in closed form."""

import math

import numpy as np
import pytest
from herdkit.text.scaling_laws import (
    PAPER,
    Measurement,
    PowerLaw,
    ScalingLawError,
    fit_scaling_law,
    isoflop_curves,
)

# Loss E + A / N^a + B / D^b of N parameters and D tokens, with the constants that Besiroglu et al. (2404.10102)
# found for Chinchilla's runs. At C = 6 N D it is least where a A / N^a = b B / D^b.
E, A, B, a, b = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
ALPHA = a / (a + b)
COEFFICIENT = 6**-ALPHA * (b * B / (a * A)) ** (1 / (a + b))
BUDGETS = np.geomspace(6e18, 1e22, 10)


def optimum(budget):
    return COEFFICIENT * budget**ALPHA


def runs(noise=0.0, seed=0, budgets=BUDGETS, shift=lambda budget: 1.0):
    rng = np.random.default_rng(seed)
    made = []
    for budget in budgets:
        # Sizes are never just around an optimum that nobody knows yet.
        for factor in np.geomspace(1 / 4, 4, 7) * rng.uniform(0.8, 1.25) * shift(budget):
            tokens = optimum(budget) * factor
            loss = E + A / (budget / 6 / tokens) ** a + B / tokens**b + noise * rng.standard_normal()
            made.append(Measurement(budget=budget, tokens=tokens, loss=loss, name=f"{budget:.1e}-{factor:.2f}"))
    return made


def test_planted_optimum_is_one():
    fine = [optimum(1e20) * factor for factor in (0.99, 1, 1.01)]
    losses = [E + A / (1e20 / 6 / D) ** a + B / D**b for D in fine]
    assert losses[1] == min(losses)


@pytest.mark.parametrize("seed", range(10))
def test_planted_constants_from_noisy_losses(seed):
    """Small runs differ by some thousandths of a nat from seed to seed."""
    found = fit_scaling_law(runs(noise=0.002, seed=seed), resamples=100)
    assert found.law.alpha == pytest.approx(ALPHA, rel=0.02)
    middle = math.sqrt(BUDGETS[0] * BUDGETS[-1])
    assert found.law.tokens(middle) == pytest.approx(optimum(middle), rel=0.02)
    for curve in found.curves:
        assert curve.optimal_tokens == pytest.approx(optimum(curve.budget), rel=0.12)


@pytest.mark.parametrize(("noise", "bound"), [(0.002, 0.25), (0.0001, 0.02), (0, 0.01)])
def test_the_coefficient_needs_quieter_losses(noise, bound):
    """A is where the law meets C = 1, twenty orders of magnitude away: noise in alpha moves it forty times as much."""
    laws = [fit_scaling_law(runs(noise=noise, seed=seed), resamples=1).law for seed in range(10 if noise else 1)]
    assert max(abs(law.coefficient / COEFFICIENT - 1) for law in laws) < bound


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    laws = [fit_scaling_law(runs(noise=0.003, seed=seed), resamples=200, seed=seed) for seed in range(40)]
    held = [low <= ALPHA <= high for low, high in (law.alpha_interval for law in laws)]
    assert 33 <= sum(held) <= 40
    far = [law.predict(1e24) for law in laws]
    assert sum(p.interval[0] <= optimum(1e24) <= p.interval[1] for p in far) >= 33
    near = laws[0].predict(1e21).interval
    assert np.ptp(np.log(near)) < np.ptp(np.log(far[0].interval))


def test_the_papers_extrapolation():
    assert PAPER.tokens(3.8e25) == pytest.approx(16.29e12, rel=1e-3)
    assert PowerLaw(alpha=0.53, coefficient=0.29).tokens(3.8e25) == pytest.approx(10.46e12, rel=1e-3)


def test_a_prediction_states_the_size_by_6nd():
    exact = fit_scaling_law(runs(), resamples=1).predict(1e22)
    assert exact.parameters * exact.tokens * 6 == pytest.approx(1e22)


@pytest.mark.parametrize(("factor", "says"), [(8, "most tokens: add smaller"), (1 / 8, "fewest tokens: add larger")])
def test_a_minimum_at_the_edge_is_said_and_left_out(factor, says):
    """Sizes far to one side of the optimum show one arm of the parabola."""
    shifted = runs(shift=lambda budget: 1 / factor if budget == BUDGETS[3] else 1.0)
    found = fit_scaling_law(shifted, resamples=1)
    assert [says in curve.fault for curve in found.curves] == [i == 3 for i in range(10)]
    without = fit_scaling_law([run for run in shifted if run.budget != BUDGETS[3]], resamples=1)
    assert found.law == without.law
    with pytest.raises(ScalingLawError, match=says):
        _ = found.curves[3].optimal_tokens


def test_a_curve_that_opens_downward_has_no_minimum():
    arch = [Measurement(budget=1e18, tokens=10.0**k, loss=3 - (k - 8) ** 2 / 100) for k in range(6, 11)]
    (curve,) = isoflop_curves(arch)
    assert "opens downward" in curve.fault


def test_too_few_points_are_an_error_that_says_which():
    few = runs(budgets=BUDGETS[:2])[:9]
    with pytest.raises(ScalingLawError, match=r"needs 2 budgets with a minimum, not 1; budget 1\.37e\+19: 2 run\(s\)"):
        fit_scaling_law(few)
    with pytest.raises(ScalingLawError, match="not 0"):
        fit_scaling_law([])


def test_three_runs_a_budget_leave_no_residuals_and_no_intervals():
    three = [run for i, run in enumerate(runs(noise=0.002)) if i % 7 in (0, 3, 6)]
    found = fit_scaling_law(three)
    assert found.alpha_interval is None
    assert found.predict(1e23).interval is None


def test_a_diverged_run_is_refused_by_name():
    with pytest.raises(ScalingLawError, match=r"1e18-d12.*diverged"):
        Measurement(budget=1e18, tokens=1e9, loss=math.nan, name="1e18-d12")
