"""Made charts: what they say is what they show, and nothing that is held out stands in a training chart."""

import re
from random import Random

import numpy as np
import pytest
from herdkit.data.synthetic.charts import (
    SMALL_VALUES,
    STYLES,
    TITLES,
    VALUES,
    chart,
    chart_data,
    pair_is_held_out,
    title_is_held_out,
)
from herdkit.data.synthetic.figures import NOUNS


def shown(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\| (\w+) \| (\d+) \|", text)}


@pytest.mark.parametrize("style", STYLES)
def test_questions_are_answered_by_what_is_shown(style):
    for seed in range(4):
        made = chart(Random(seed), style, side=160, split="new" if seed % 2 else "train")
        asked = {question.kind: question for question in made.questions}
        assert all(question.answer in question.choices for question in made.questions)
        assert asked["title"].answer == made.text.splitlines()[0].removeprefix("# ")
        names = re.findall(r"\| (\w+) \|", made.text)[1:]
        assert asked["count"].answer == str(len(names))
        values = shown(made.text)
        if not values:
            assert "value" not in asked
            continue
        assert list(values) == names
        assert values[asked["largest"].answer] == max(values.values())
        assert values[asked["smallest"].answer] == min(values.values())
        assert values[asked["larger"].answer] == max(values[name] for name in asked["larger"].choices)
        name = asked["value"].question.removeprefix("what is the value of ")
        assert asked["value"].answer == str(values[name])


def test_a_value_is_asked_for_only_where_it_is_written(monkeypatch):
    """At the moment of drawing, what is written into the picture."""
    from matplotlib.axes import Axes

    written = []

    def spy(self, x, y, s, *args, text=Axes.text, **settings):
        written.append(s)
        return text(self, x, y, s, *args, **settings)

    monkeypatch.setattr(Axes, "text", spy)
    without = 0
    for seed in range(24):
        written.clear()
        made = chart(Random(seed), ("bar", "flat bar", "line")[seed % 3], side=160)
        numbers = [int(text) for text in written if text.isdigit()]
        asks = "value" in {question.kind for question in made.questions}
        assert asks == bool(numbers)
        assert sorted(numbers) == sorted(shown(made.text).values())
        without += not asks
    assert 2 <= without <= 12


def test_the_bars_of_a_chart_are_as_high_as_their_values():
    """Columns of the picture that are a bar's ink, counted."""
    made = chart(Random(6), "bar", side=448)
    values = list(shown(made.text).values())
    pixels = np.asarray(made.picture).astype(int)
    heights = ((pixels.max(2) - pixels.min(2)) > 60).sum(0)
    runs = [run for run in np.split(heights, np.flatnonzero(np.diff(heights > 4)) + 1) if run.max() > 4]
    tall = [float(np.median(run)) for run in runs if len(run) > 8]
    assert len(tall) == len(values) >= 3
    assert np.allclose(tall, np.array(values) * tall[0] / values[0], rtol=0.08, atol=3)


def test_nothing_held_out_is_trained_on_and_nothing_else_is_tested():
    rng = Random(0)
    for split, held_out in (("train", False), ("new", True)):
        for _ in range(300):
            data = chart_data(rng, split, small=True, possible=SMALL_VALUES)
            assert title_is_held_out(data.title) == held_out
            assert {pair_is_held_out(*pair) for pair in zip(data.names, data.values, strict=True)} == {held_out}
            assert 3 <= len(data.names) == len(set(data.values)) <= 5
            assert all(len(name) <= 5 for name in data.names)
            assert set(data.values) <= set(SMALL_VALUES)
    # Each word and each number is seen in training, so that all that is new is how they go together.
    trained = [title for title in TITLES if not title_is_held_out(title)]
    assert {word for title in trained for word in title.split()} == {word for title in TITLES for word in title.split()}
    assert 5 <= len(TITLES) - len(trained) <= 10
    short = [name for name in NOUNS if len(name) <= 5]
    for value in SMALL_VALUES:
        assert any(not pair_is_held_out(name, value) for name in short)
    for name in NOUNS:
        assert 0.7 < sum(not pair_is_held_out(name, value) for value in VALUES) / len(VALUES) < 1


def test_what_is_compared_can_be_told_apart():
    rng = Random(1)
    for _ in range(200):
        data = chart_data(rng)
        values = dict(zip(data.names, data.values, strict=True))
        ranked = sorted(data.values)
        assert min(ranked[-1] - ranked[-2], ranked[1] - ranked[0]) >= 0.06 * ranked[-1]
        (larger,) = (question for question in data.questions(rng) if question.kind == "larger")
        a, b = (values[name] for name in larger.choices)
        assert abs(a - b) >= 0.06 * ranked[-1]
    pies = [chart_data(rng, share=0.07) for _ in range(50)]
    assert all(min(pie.values) >= 0.07 * sum(pie.values) for pie in pies)


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match="no chart style 'radar'; there are bar, flat bar"):
        chart(Random(0), "radar")
