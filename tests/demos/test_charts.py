"""The chart demo: its chain of recipes at minimal size, and an examination that notices a model that does not look."""

import json

import pytest
from herdkit.adapters.model_directory import load
from herdkit.data.shards import ShardReader
from herdkit.data.synthetic.charts import QUESTIONS, STYLES
from herdkit.demos import charts
from herdkit.demos.chain import Chain
from herdkit.demos.charts import Swapped, cells, cells_right, examine, run
from herdkit.train.config import load_recipe


def small_recipe(path, kind, overrides):
    """A step or two of every recipe; sizes of the models are the recipe's."""
    few = ["trainer.steps=2", "trainer.batch_size=2", "schedule={kind: constant, warmup_steps: 0}"]
    return load_recipe(path, kind, [*overrides, *few])


class Here(Chain):
    """Runs its links in this process, one after another."""

    def train(self):
        for link in self.links:
            link.stage.run(self.recipes[link.name], self.stages / link.name)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("charts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "Chain", Here)
        patch.setattr(charts, "load_recipe", small_recipe)
        build = charts.build_annealing
        patch.setattr(charts, "build_annealing", lambda *args, **settings: build(*args, workers=0, **settings))
        made = run(out, seed=1, written=40, charts=4, held_out=12)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(made))
    return out, made


def test_every_link_runs_and_every_question_is_graded(results):
    _, made = results
    assert made["all"]["count"] == 12 == sum(row["count"] for row in made["kinds"].values())
    assert set(made["kinds"]) <= set(QUESTIONS)
    assert set(made["styles"]) <= set(STYLES)
    for row in made["kinds"].values():
        assert {"picture", "none", "another", "chance", "interval", "count"} == set(row)
        assert 0 < row["chance"] <= 0.5


def test_tables_are_compared_cell_by_cell(results):
    _, made = results
    assert set(made["cells"]) == {"picture", "none", "another"}
    true = cells("# town stock\n\n| item | value |\n|---|---|\n| cars | 3 |\n| tea | 12 |")
    assert true == {
        ("title", 0): "# town stock", ("name", 0): "cars", ("value", 0): "3", ("name", 1): "tea", ("value", 1): "12",
    }  # fmt: skip
    given = cells("# town stock\n\n| item | value |\n|---|---|\n| cars | 4 |\n| tea | 12 |\n| oil | 5 |")
    assert cells_right([(true, given), (true, cells(""))]) == {"title": 0.5, "name": 0.5, "value": 0.25}


def test_the_language_model_is_not_changed_by_the_pictures(results):
    out, _ = results
    before, after = (load(out / "stages" / name / "model").text.state_dict() for name in ("text-sft", "image-sft"))
    assert all(before[name].equal(after[name]) for name in before)


def test_a_model_that_does_not_look_is_found_out(results, monkeypatch):
    """Answers that are right only with the question's own picture score nothing with another, or with none."""
    out, _ = results
    reader = ShardReader(str(out / "data" / "chart_questions_new" / "*.tar"))
    right = {
        sample.members["png"]: sample.json()["messages"][-1]["content"] for sample in map(reader.__getitem__, range(12))
    }

    def looking(model, dialogs, max_new_tokens):
        return [next((right[part.media] for part in dialog[0].media), "") for dialog in dialogs]

    monkeypatch.setattr("herdkit.adapters.evaluate.reply_batch", looking)
    found = examine(load(out / "stages" / "image-sft" / "model"), reader)
    assert found["all"]["picture"] == 1.0
    assert found["all"]["none"] == 0.0
    assert found["all"]["another"] < 0.5
    assert not found["wrong"]
    swapped = Swapped(reader)
    assert len(swapped) == 12
    assert swapped[11].members["png"] == reader[0].members["png"]
    assert swapped[11].json() == reader[11].json()
