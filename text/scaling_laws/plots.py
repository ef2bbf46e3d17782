"""The figures of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .fit import IsoFlopCurve, Prediction, ScalingLaw
from .forecast import Forecast, Forecaster, Scored

SIZE = (6.4, 4.4)


def plot_isoflops(curves: Sequence[IsoFlopCurve], path: Path) -> None:
    """Held-out loss over training tokens: a parabola for each budget, its vertex starred; curves with a fault are
    dashed and have none."""
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for curve, colour in zip(curves, colours, strict=True):
        tokens = np.array([run.tokens for run in curve.runs])
        label = f"{curve.budget:.1e}" + (" (no minimum)" if curve.fault else "")
        axes.plot(tokens, [run.loss for run in curve.runs], "o", color=colour, label=label)
        if curve.parabola is not None:
            x = np.linspace(np.log(tokens[0]), np.log(tokens[-1]), 200)
            axes.plot(np.exp(x), curve.parabola(x), "--" if curve.fault else "-", color=colour)
        if not curve.fault:
            axes.plot(curve.optimal_tokens, curve.optimal_loss, "*", color="crimson", markersize=12, zorder=3)
    axes.set(xscale="log", xlabel="training tokens", ylabel="held-out loss (nats per token)")
    axes.legend(title="FLOPs", fontsize="small")
    figure.savefig(path, dpi=150)


def plot_power_law(law: ScalingLaw, predictions: Sequence[Prediction], path: Path) -> None:
    """Compute-optimal tokens over FLOPs with the fitted law, its 95% band, and the targets."""
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    used = [curve for curve in law.curves if not curve.fault]
    ends = [*(curve.budget for curve in used), *(prediction.flops for prediction in predictions)]
    flops = np.geomspace(min(ends), max(ends), 50)
    along = [law.predict(float(c)) for c in flops]
    axes.plot(flops, [p.tokens for p in along], color="tab:blue", label=f"$N^* \\propto C^{{{law.law.alpha:.3f}}}$")
    bands = [p.interval for p in along if p.interval is not None]
    if bands:
        low, high = zip(*bands, strict=True)
        axes.fill_between(flops, low, high, color="tab:blue", alpha=0.2, label="95% of the bootstrap")
    axes.plot([c.budget for c in used], [c.optimal_tokens for c in used], "*", color="crimson", label="minima")
    if predictions:
        axes.plot([p.flops for p in predictions], [p.tokens for p in predictions], "kD", label="predicted")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="compute-optimal training tokens")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_forecast(
    fits: Forecaster, optimal: Sequence[Scored], others: Sequence[Scored], forecasts: Sequence[Forecast], path: Path
) -> None:
    """Both steps side by side: NLL over FLOPs, accuracy over NLL."""
    figure = Figure((2 * SIZE[0], SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    budgets = [model.flops for model in optimal if model.flops is not None]
    flops = np.geomspace(min(budgets), max([*budgets, *(f.flops for f in forecasts)]), 50)
    left.plot(flops, [fits.line(float(c)) for c in flops], color="tab:blue")
    left.plot(budgets, [model.nll for model in optimal], "o", color="tab:blue", label="compute-optimal models")
    left.plot([f.flops for f in forecasts], [f.nll for f in forecasts], "kD", label="forecast")
    left.set(xscale="log", xlabel="training FLOPs", ylabel="NLL of the correct answer per character")
    nlls = [model.nll for model in (*optimal, *others)] + [f.nll for f in forecasts]
    x = np.linspace(min(nlls), max(nlls), 100)
    right.plot(x, [fits.sigmoid(float(nll)) for nll in x], color="tab:blue")
    right.axhline(fits.sigmoid.chance, color="grey", linestyle=":", label="chance")
    right.plot([m.nll for m in optimal], [m.accuracy for m in optimal], "o", color="tab:blue")
    right.plot([m.nll for m in others], [m.accuracy for m in others], "s", color="tab:orange", label="other models")
    right.plot([f.nll for f in forecasts], [f.accuracy for f in forecasts], "kD", label="forecast")
    right.set(xlabel="NLL of the correct answer per character", ylabel="accuracy")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=150)
