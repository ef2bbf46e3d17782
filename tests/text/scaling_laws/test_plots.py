from herdkit.text.scaling_laws import Measurement, Scored, fit_forecast, fit_scaling_law
from herdkit.text.scaling_laws.plots import plot_forecast, plot_isoflops, plot_power_law


def test_figures_show_curves_with_and_without_a_minimum(tmp_path):
    """Four budgets, of which one sees an arm of its parabola alone and one has two runs."""
    runs = [
        Measurement(budget=10.0**c, tokens=10.0 ** (c / 2 + k), loss=5 - c / 10 + (k - (c == 14)) ** 2)
        for c, count in ((12, 5), (13, 5), (14, 5), (15, 2))
        for k in [-1 + i / 2 for i in range(count)]
    ]
    law = fit_scaling_law(runs, resamples=20)
    assert [bool(curve.fault) for curve in law.curves] == [False, False, True, True]
    optimal = [Scored(nll=nll, accuracy=accuracy, flops=c) for nll, accuracy, c in ((2.0, 0.4, 1e12), (1.5, 0.7, 1e13))]
    others = [Scored(nll=1.2, accuracy=0.9)]
    fits = fit_forecast(optimal, others, 0.25, resamples=5)
    plot_isoflops(law.curves, tmp_path / "isoflops.png")
    plot_power_law(law, [law.predict(1e16)], tmp_path / "power_law.png")
    plot_forecast(fits, optimal, others, [fits.predict(1e16)], tmp_path / "forecast.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
