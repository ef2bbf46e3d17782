import math

import pytest
from herdkit.train import ScheduleConfig, fraction


def values(steps=100, **config):
    schedule = ScheduleConfig(**config)
    return [fraction(schedule, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(kind):
    found = values(kind=kind, warmup_steps=10, decay_steps=20)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10] == 1.0
    assert max(found) == 1.0


def test_cosine():
    found = values(kind="cosine", warmup_steps=20, final_fraction=0.1)
    for step in range(20, 100):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert found[step] == pytest.approx(expected)
    assert found[60] == pytest.approx(0.55)


def test_cosine_stays_at_the_end_of_its_decay():
    found = values(kind="cosine", final_fraction=0.1, decay_steps=50)
    assert found[25] == pytest.approx(0.55)
    assert found[50:] == pytest.approx([0.1] * 50)


def test_linear_to_zero_never_wastes_an_update():
    found = values(kind="linear", warmup_steps=20, final_fraction=0.0)
    assert found[20:] == pytest.approx([1 - i / 80 for i in range(80)])
    assert min(found) > 0


def test_wsd_is_stable_and_then_decays_at_the_end_of_the_run():
    found = values(kind="wsd", warmup_steps=10, decay_steps=20, final_fraction=0.2)
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([1 - 0.8 * i / 20 for i in range(20)])
    assert fraction(ScheduleConfig(kind="wsd", decay_steps=20), 80, 200) == 1.0


def test_constant_and_a_run_that_is_all_warm_up():
    assert values(kind="constant") == [1.0] * 100
    assert values(steps=4, kind="cosine", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
    assert values(steps=4, kind="linear", warmup_steps=8) == [1 / 8, 2 / 8, 3 / 8, 4 / 8]


def test_wsd_needs_decay_steps():
    with pytest.raises(ValueError, match="decay_steps"):
        ScheduleConfig(kind="wsd")
