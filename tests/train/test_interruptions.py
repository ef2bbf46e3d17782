import math
from dataclasses import replace

import pytest
from herdkit.train.interruptions import Reliability, daly_interval, simulate, young_interval

HOUR = 3600.0
PAPER = Reliability.of_the_paper()
BASE = Reliability(devices=64, unplanned=10 * HOUR, interval=1800.0, stall=60.0, detection=300.0, restart=600.0)


def agrees(plan, days=600.0, runs=40):
    """Formula and simulation, within four standard errors."""
    found = simulate(plan, days, runs=runs)
    return abs(found.effective_time - plan.effective_time()) < 4 * found.error


def test_the_papers_run_is_over_ninety_percent_effective():
    assert PAPER.effective_time() == pytest.approx(0.911, abs=5e-4)
    found = simulate(PAPER, days=54, runs=100)
    assert found.effective_time - 2 * found.spread > 0.9  # nearly any single run too
    assert found.interruptions == pytest.approx(466, rel=0.02)
    # It rests on the assumptions: with checkpoints every hour it would not be.
    assert replace(PAPER, interval=HOUR).effective_time() < 0.82


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"planned": 5 * HOUR},
        {"unplanned": math.inf, "planned": 5 * HOUR, "stall": 900.0},
        {"stall": 0.0, "detection": 0.0, "restart": 0.0},
        {"unplanned": HOUR, "restart": 2 * HOUR},  # most restarts are interrupted
        {"unplanned": HOUR, "planned": HOUR, "stall": 1500.0, "restart": 3 * HOUR},
        {"unplanned": HOUR, "interval": 3 * HOUR},
    ],
    ids=str,
)
def test_formula_and_simulation_agree(change):
    assert agrees(replace(BASE, **change))


def test_without_planned_interruptions_it_is_dalys_formula():
    plan = replace(BASE, detection=0.0)
    mean = plan.unplanned
    expected = plan.interval / (mean * math.exp(plan.restart / mean) * math.expm1((plan.interval + plan.stall) / mean))
    assert plan.effective_time() == pytest.approx(expected, rel=1e-12)


def test_without_interruptions_checkpoints_alone_cost():
    plan = replace(BASE, unplanned=math.inf)
    assert plan.effective_time() == 1800 / 1860
    assert simulate(plan, days=31).effective_time == pytest.approx(1800 / 1860, abs=1e-3)
    assert simulate(plan, days=31).interruptions == 0
    # Rare ones lead to the same.
    assert replace(BASE, unplanned=1e13, planned=1e13).effective_time() == pytest.approx(1800 / 1860, rel=1e-6)


def test_hardly_anything_is_saved_where_interruptions_come_faster_than_checkpoints():
    plan = replace(BASE, unplanned=300.0)
    assert 0 < plan.effective_time() < 1e-3
    assert plan.with_best_interval().effective_time() > 10 * plan.effective_time()
    assert replace(BASE, unplanned=0.5).effective_time() == 0
    assert simulate(replace(BASE, unplanned=0.5), days=0.1, runs=2).effective_time < 1e-3
    # Announced ones lose nothing, however long the interval.
    assert replace(BASE, unplanned=math.inf, planned=HOUR, interval=1e6).effective_time() > 0.8


@pytest.mark.parametrize(("stall", "between"), [(10.0, 3 * HOUR), (60.0, 10 * HOUR), (600.0, 2 * HOUR)])
def test_dalys_interval_is_the_best(stall, between):
    plan = replace(BASE, stall=stall, unplanned=between)
    best = max((replace(plan, interval=60.0 * 1.01**i).effective_time(), 60.0 * 1.01**i) for i in range(600))
    assert daly_interval(stall, between) == pytest.approx(best[1], rel=0.03)
    assert plan.with_best_interval().effective_time() == pytest.approx(best[0], rel=1e-4)


def test_youngs_interval_is_the_limit_of_short_checkpoints():
    assert young_interval(2.0, 10_000.0) == 200
    assert daly_interval(1e-4, 1e4) == pytest.approx(young_interval(1e-4, 1e4), rel=1e-3)
    assert daly_interval(20.0, 10.0) == 10
    assert daly_interval(20.0, math.inf) == math.inf


def test_more_devices_are_interrupted_more_often():
    larger = PAPER.with_devices(8 * 16_384)
    assert larger.unplanned == pytest.approx(54 * 24 * HOUR / 419 / 8)
    assert larger.planned == pytest.approx(54 * 24 * HOUR / 47 / 8)
    sizes = [PAPER.with_devices(16_384 * 2**i).effective_time() for i in range(-4, 6)]
    assert sizes == sorted(sizes, reverse=True)
    assert agrees(larger, days=200)


def test_the_seed_decides():
    assert simulate(BASE, 30, seed=3) == simulate(BASE, 30, seed=3) != simulate(BASE, 30, seed=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unplanned": 0.0}, "unplanned must be above 0, not 0.0"),
        ({"interval": -1.0}, "interval must be above 0"),
        ({"interval": math.inf}, "interval must be finite"),
        ({"restart": math.inf}, "restart must be at least 0 and finite"),
        ({"stall": -1.0}, "stall must be at least 0"),
        ({"devices": 0}, "devices must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)
    with pytest.raises(ValueError, match="runs at least 2"):
        simulate(BASE, 1, runs=1)
