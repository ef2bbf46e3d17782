"""The stage: a sweep, its fits, its figures, `scaling_laws.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ...train.files import write_json
from ...train.parallel import on_first
from ...train.progress import ProgressLine
from ...train.recipe import Stage
from ..model_directory import load_text
from .fit import IsoFlopCurve, Measurement, ScalingLaw, fit_scaling_law, isoflop_curves
from .forecast import Scored, fit_forecast
from .plots import plot_forecast, plot_isoflops, plot_power_law
from .questions import answer, word_orders
from .recipe import ForecastConfig, ScalingLawRecipe
from .sweep import plan, read_documents, run_points


def run(recipe: ScalingLawRecipe, run_dir: Path) -> dict[str, Any]:
    """Runs what is not finished of the sweep, fits the law and predicts the targets.

    Each run of the sweep is a run directory `runs/<budget>-<size>` of `text.pretrain` with a `measured.json`. Killed
    at any time, the same command goes on. New budgets, sizes and targets may be added to the recipe later.

    Returns:
        The content of `run_dir/scaling_laws.json`: "runs", "curves" (one for each budget, with the optimum or the
        "fault" for which it is left out), "diverged" (names and reasons), "law", "predictions", "forecast". Beside it
        lie isoflops.png, power_law.png and forecast.png.

    Raises:
        ScalingLawError: the plan does not work, a run failed, or the runs determine no law; what they do show is
            written all the same.
    """
    points = on_first(lambda: plan(recipe, run_dir))
    records = run_points(points, recipe.workers)
    return on_first(lambda: conclude(recipe, records, run_dir))


def conclude(recipe: ScalingLawRecipe, records: Sequence[dict[str, Any]], run_dir: Path) -> dict[str, Any]:
    """Everything after the runs: fits, figures, result."""
    diverged = {record["name"]: reason for record in records if (reason := _divergence(record, recipe))}
    good = [record for record in records if record["name"] not in diverged]
    measurements = [Measurement(budget=r["budget"], tokens=r["tokens"], loss=r["loss"], name=r["name"]) for r in good]
    curves = isoflop_curves(measurements)
    result: dict[str, Any] = {
        "runs": [{key: value for key, value in record.items() if key != "recipe"} for record in records],
        "diverged": diverged,
        "curves": [_describe(curve) for curve in curves],
        "law": None,
        "predictions": [],
        "forecast": None,
    }
    path = run_dir / "scaling_laws.json"
    write_json(path, result)
    if curves:
        plot_isoflops(curves, run_dir / "isoflops.png")
    out = ProgressLine("scaling laws", len(records))
    out.say(_table(curves, diverged))

    law = fit_scaling_law(measurements, recipe.resamples)
    predictions = [law.predict(target) for target in recipe.targets]
    result["law"] = {
        "alpha": law.law.alpha,
        "alpha_interval": law.alpha_interval,
        "coefficient": law.law.coefficient,
        "resamples_without_law": law.failed,
    }
    result["predictions"] = [asdict(p) | {"parameters_by_6nd": p.parameters} for p in predictions]
    write_json(path, result)
    low_high = "" if law.alpha_interval is None else " ({:.3f} to {:.3f})".format(*law.alpha_interval)
    out.say(f"N*(C) = {law.law.coefficient:.3g} C^{law.law.alpha:.3f}{low_high} tokens")
    for prediction in predictions:
        out.say(f"optimum of {prediction.flops:.3g} FLOPs: {prediction.tokens:.3g} tokens")
    plot_power_law(law, predictions, run_dir / "power_law.png")
    if recipe.forecast is not None:
        result["forecast"] = _forecast(recipe, recipe.forecast, law, good, run_dir)
        write_json(path, result)
    return json.loads(path.read_text())


def _divergence(record: dict[str, Any], recipe: ScalingLawRecipe) -> str:
    """Why a run counts as diverged; "" where it does not."""
    if "diverged" in record:
        return record["diverged"]
    uniform = math.log(recipe.model.vocab_size)
    if record["loss"] is None or not record["loss"] < uniform:
        return f"held-out loss {record['loss']}, no better than that of guessing evenly, {uniform:.2f}"
    return ""


def _describe(curve: IsoFlopCurve) -> dict[str, Any]:
    described: dict[str, Any] = {
        "budget": curve.budget,
        "runs": [run.name for run in curve.runs],
        "fault": curve.fault,
        "parabola": None if curve.parabola is None else curve.parabola.convert().coef.tolist(),
    }
    if not curve.fault:
        described |= {"optimal_tokens": curve.optimal_tokens, "optimal_loss": curve.optimal_loss}
    return described


def _forecast(
    recipe: ScalingLawRecipe,
    config: ForecastConfig,
    law: ScalingLaw,
    records: Sequence[dict[str, Any]],
    run_dir: Path,
) -> dict[str, Any]:
    scored = {
        r["name"]: Scored(name=r["name"], flops=r["flops"], nll=r["answers"]["nll"], accuracy=r["answers"]["accuracy"])
        for r in records
    }
    optimal = [scored.pop(curve.best_run.name) for curve in law.curves if not curve.fault]
    questions = word_orders(read_documents(recipe.measured_on), config)
    others = list(scored.values())
    for path in config.others:
        answers = answer(*load_text(path), questions)
        others.append(Scored(name=path, nll=answers.nll, accuracy=answers.accuracy))
    fits = fit_forecast(optimal, others, 1 / config.choices, recipe.resamples)
    forecasts = [fits.predict(target) for target in recipe.targets]
    plot_forecast(fits, optimal, others, forecasts, run_dir / "forecast.png")
    return {
        "questions": len(questions),
        "optimal": [asdict(model) for model in optimal],
        "others": [asdict(model) for model in others],
        "line": asdict(fits.line),
        "sigmoid": asdict(fits.sigmoid),
        "predictions": [asdict(forecast) for forecast in forecasts],
    }


def _table(curves: Sequence[IsoFlopCurve], diverged: dict[str, str]) -> Table:
    table = Table("FLOPs", "runs", "optimal tokens", "loss", "remark", title="scaling laws: budgets")
    for curve in curves:
        optimum = ("", "") if curve.fault else (f"{curve.optimal_tokens:.3g}", f"{curve.optimal_loss:.4f}")
        table.add_row(f"{curve.budget:.3g}", str(len(curve.runs)), *optimum, curve.fault and f"left out: {curve.fault}")
    for name, reason in diverged.items():
        table.add_row("", name, "", "", f"diverged, left out: {reason}")
    return table


STAGE = Stage(ScalingLawRecipe, run)
