"""The sweep around its runs: planning, going on, what goes wrong; and one real sweep of a few steps."""

import dataclasses
import json
import random
from contextlib import suppress

import pytest
from herdkit.cli import main
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import DataConfig, SourceConfig
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.held_out import HeldOutConfig
from herdkit.text.model_directory import save_text
from herdkit.text.scaling_laws import (
    BudgetConfig,
    ForecastConfig,
    ScalingLawError,
    ScalingLawRecipe,
    SizeConfig,
    run,
    study,
)
from herdkit.text.scaling_laws import sweep as sweep_module
from herdkit.text.scaling_laws.sweep import plan
from herdkit.text.tokenizer import Tokenizer
from herdkit.train import NonFiniteError, OptimizerConfig, RunDirectoryError, ScheduleConfig, TrainerConfig, dump


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    for name, count in (("train", 60), ("new", 8)):
        with ShardWriter(folder / name / "%06d.tar") as writer:
            for i in range(count):
                writer.write(f"{i:04d}", {"txt": " ".join(rng.choices(words, k=rng.randint(20, 60)))})
    return folder


SIZES = [
    SizeConfig(name=f"d{dim}", dim=dim, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=2 * dim, lr_scale=8 / dim)
    for dim in (8, 16, 24, 32)
]


@pytest.fixture
def recipe(data):
    return ScalingLawRecipe(
        stage="text.scaling_laws",
        model=TransformerConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, vocab_size=512, max_seq_len=64),
        data=DataConfig(sources=[SourceConfig(shards=str(data / "train" / "*.tar"))], row_length=64),
        window=16,
        held_out=HeldOutConfig(sources=[SourceConfig(shards=str(data / "new" / "*.tar"))]),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=2, final_fraction=0.1),
        trainer=TrainerConfig(steps=1000, batch_size=1, checkpoint_every=1000),
        sizes=SIZES,
        budgets=[BudgetConfig(flops=1e9, batch_size=4), BudgetConfig(flops=3e9, batch_size=4)],
        targets=[1e11],
        resamples=50,
    )


@pytest.fixture
def trained(monkeypatch):
    """Replaces training, and losses by planted ones; returns the names of the runs in the order in which they were
    trained, and a dict of the errors that runs shall raise, by name."""
    names, errors = [], {}

    def train(recipe, run_dir):
        if run_dir.name in errors:
            raise errors[run_dir.name]
        names.append(run_dir.name)
        model = Transformer(recipe.model)
        save_text(model, Tokenizer.load(recipe.tokenizer), run_dir / "model")
        steps = recipe.trainer.steps
        total = model.parameter_table()["total"]
        return {"parameters": total, "tokens": 1000 * steps, "samples": 16 * steps, "wall_seconds": 1.0}

    # The loss depends on the size alone, with the best in the middle.
    def measure(model, tokenizer, config):
        return 2.0 + abs(model.config.dim - 22) / 50, 1.0

    monkeypatch.setattr(sweep_module.pretrain, "run", train)
    monkeypatch.setattr(sweep_module, "measure", measure)
    for plot in ("plot_isoflops", "plot_power_law", "plot_forecast"):  # they take a second each
        monkeypatch.setattr(study, plot, lambda *arguments: arguments[-1].touch())
    return names, errors


def test_each_run_spends_its_budget_and_differs_in_nothing_else(recipe, tmp_path):
    points = plan(recipe, tmp_path)
    assert [point.name for point in points] == [f"{c}-d{d}" for c in ("1e+09", "3e+09") for d in (8, 16, 24, 32)]
    for point in points:
        model = Transformer(point.recipe.model)
        size = next(size for size in SIZES if point.name.endswith(f"-{size.name}"))
        assert point.flops_per_token == 3 * model.flops_per_token(32)
        assert point.recipe.optimizer.lr == pytest.approx(1e-2 * size.lr_scale)
        assert point.recipe.trainer.batch_size == 4
        same = dataclasses.replace(
            point.recipe,
            model=points[0].recipe.model,
            optimizer=points[0].recipe.optimizer,
            trainer=points[0].recipe.trainer,
        )
        assert same == points[0].recipe
    updates = [point.recipe.trainer.steps for point in points]
    assert updates[4:] == pytest.approx([3 * steps for steps in updates[:4]], rel=0.06)


def test_a_budget_may_train_a_part_of_the_sizes(recipe, tmp_path):
    recipe.budgets[0].sizes = ["d24", "d8"]
    assert [point.name for point in plan(recipe, tmp_path)][:3] == ["1e+09-d8", "1e+09-d24", "3e+09-d8"]


def test_a_run_that_cannot_be_is_refused_before_any_is_trained(recipe, tmp_path, trained):
    recipe.schedule.warmup_steps = 17
    with pytest.raises(
        ScalingLawError, match=r"run 1e\+09-d24: 1e\+09 FLOPs make \d+ updates of this size, of which 17"
    ):
        run(recipe, tmp_path)
    recipe.schedule.warmup_steps, recipe.trainer.steps = 2, 200
    with pytest.raises(ScalingLawError, match=r"run 3e\+09-d8: .* trainer.steps allows 200"):
        run(recipe, tmp_path)
    assert trained[0] == []


def test_a_killed_sweep_goes_on_and_trains_no_run_twice(recipe, tmp_path, trained):
    names, errors = trained
    errors["3e+09-d8"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "killed")
    assert names == [f"1e+09-d{d}" for d in (8, 16, 24, 32)]
    errors.clear()
    result = run(recipe, tmp_path / "killed")
    assert len(names) == len(set(names)) == 8
    assert result["law"]["alpha"] == pytest.approx(1, abs=0.1)  # one best size: all compute goes into tokens
    again = run(recipe, tmp_path / "killed")
    assert len(names) == 8
    assert again == result == json.loads((tmp_path / "killed" / "scaling_laws.json").read_text())
    assert {path.name for path in (tmp_path / "killed").glob("*.png")} == {"isoflops.png", "power_law.png"}
    recipe.budgets.append(BudgetConfig(flops=6e9, batch_size=4, sizes=["d8", "d16", "d32"]))
    assert len(run(recipe, tmp_path / "killed")["curves"]) == 3
    assert names[8:] == ["6e+09-d8", "6e+09-d16", "6e+09-d32"]


def test_another_recipe_is_refused_and_other_measurements_are_taken(recipe, tmp_path, trained, data):
    names, _ = trained
    run(recipe, tmp_path)
    changed = dataclasses.replace(recipe, optimizer=OptimizerConfig(lr=2e-2))
    with pytest.raises(
        RunDirectoryError, match=r"1e\+09-d8 holds a run of another recipe: optimizer\.lr: 0\.01 -> 0\.02"
    ):
        run(changed, tmp_path)
    asked = dataclasses.replace(recipe, forecast=ForecastConfig(questions=20, prompt_chars=20, answer_chars=20))
    with suppress(ScalingLawError):  # weights at random know nothing: there may be no sigmoid to fit
        run(asked, tmp_path)
    assert len(names) == 8
    record = json.loads((tmp_path / "runs" / "1e+09-d8" / "measured.json").read_text())
    assert set(record["answers"]) == {"nll", "accuracy"}


def test_a_diverged_run_is_named_and_left_out(recipe, tmp_path, trained):
    errors = trained[1]
    errors["1e+09-d8"] = NonFiniteError("step 3: the loss is nan")
    result = run(recipe, tmp_path)
    assert result["diverged"] == {"1e+09-d8": "step 3: the loss is nan"}
    assert result["curves"][0]["runs"] == ["1e+09-d32", "1e+09-d24", "1e+09-d16"]
    errors["1e+09-d24"] = errors["1e+09-d16"] = NonFiniteError("too")
    with pytest.raises(ScalingLawError, match="budget 1e\\+09: 1 run"):
        run(recipe, tmp_path / "other")
    written = json.loads((tmp_path / "other" / "scaling_laws.json").read_text())
    assert len(written["diverged"]) == 3
    assert written["law"] is None


def test_a_failed_run_is_named(recipe, tmp_path, trained):
    trained[1]["3e+09-d16"] = RuntimeError("disk full")
    with pytest.raises(ScalingLawError, match=r"run 3e\+09-d16 in .*3e\+09-d16 failed: disk full"):
        run(recipe, tmp_path)


MISTAKES = [
    ({"sizes": []}, "sizes must be"),
    ({"sizes": [*SIZES, SIZES[0]]}, "'d8' is there twice"),
    ({"budgets": [BudgetConfig(flops=1e9, batch_size=1)] * 2}, r"'1e\+09' is there twice"),
    ({"budgets": [BudgetConfig(flops=1e9, batch_size=1, sizes=["d9"])]}, r"budgets\[0\].sizes: no size is named 'd9'"),
    ({"sizes": [dataclasses.replace(SIZES[0], n_heads=3)]}, r"sizes\[0\]: dim \(8\) must be"),
    ({"targets": [-1.0]}, "targets must be above 0"),
]


@pytest.mark.parametrize(("change", "says"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_in_the_recipe(recipe, change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(recipe, **change)


def test_a_real_sweep_in_a_process_of_its_own(recipe, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    recipe.sizes, recipe.workers, recipe.schedule.warmup_steps = SIZES[:3], 1, 1
    recipe.budgets = [BudgetConfig(flops=flops, batch_size=4) for flops in (5e8, 1e9)]
    file.write_text(dump(recipe))
    forecast = "forecast={questions: 20, prompt_chars: 20, answer_chars: 20}"
    code = main(["scaling-laws", str(file), "--run-dir", str(tmp_path / "run"), forecast])
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "run" / "scaling_laws.json").read_text())
    # A handful of updates may leave the minimum at an edge; then the command says so.
    if code:
        assert "needs 2 budgets with a minimum" in err
    else:
        assert json.loads(out.splitlines()[-1])["law"] == result["law"]
    assert [r["name"] for r in result["runs"]] == [f"{c}-d{d}" for c in ("5e+08", "1e+09") for d in (8, 16, 24)]
    for record in result["runs"]:
        assert record["flops"] == pytest.approx(record["budget"], rel=0.1)
        assert 0 < record["loss"] < 6.3
        assert record["nll_per_byte"] == pytest.approx(record["nll_per_character"])
        assert 0 <= record["answers"]["accuracy"] <= 1
        assert (tmp_path / "run" / "runs" / record["name"] / "log.txt").exists()
    assert (tmp_path / "run" / "isoflops.png").stat().st_size > 10_000
