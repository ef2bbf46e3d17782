"""Scaling laws (section 3.2.1 of the paper): IsoFLOP sweeps, compute-optimal training tokens, downstream forecast."""

from .fit import (
    PAPER,
    IsoFlopCurve,
    Measurement,
    PowerLaw,
    Prediction,
    ScalingLaw,
    ScalingLawError,
    fit_scaling_law,
    isoflop_curves,
)
from .forecast import Forecast, Forecaster, Line, Scored, Sigmoid, fit_forecast, fit_sigmoid
from .recipe import BudgetConfig, ForecastConfig, MadeData, ScalingLawRecipe, SizeConfig
from .study import run

__all__ = [
    "PAPER",
    "BudgetConfig",
    "Forecast",
    "ForecastConfig",
    "Forecaster",
    "IsoFlopCurve",
    "Line",
    "MadeData",
    "Measurement",
    "PowerLaw",
    "Prediction",
    "ScalingLaw",
    "ScalingLawError",
    "ScalingLawRecipe",
    "Scored",
    "Sigmoid",
    "SizeConfig",
    "fit_forecast",
    "fit_scaling_law",
    "fit_sigmoid",
    "isoflop_curves",
    "run",
]
