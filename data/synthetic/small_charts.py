"""Charts of few pixels, with large type, for models that are as small. Names and numbers stand in the cells of a grid
of six by six: an encoder whose patches are those cells meets each word in few guises, and learns to read in minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.patches import Rectangle, Wedge
from PIL import Image

from .figures import drawn, new_figure, points

CELLS = 6
MOST_ROWS = CELLS - 1
"""Of the title, and of each name: the first row is the title's."""

_TYPE = 0.36
"""Height of letters, in cells."""
_GAP = 0.08
"""Half the space between the words of the title, in cells."""
_LEFT, _RIGHT = 0.15, CELLS - 0.15


def draw(
    style: str, title: str, names: Sequence[str], values: Sequence[int], numbers: bool, inks: Sequence[str], side: int
) -> Image.Image:
    """A chart of at most `MOST_ROWS` names, RGB, `side` pixels squared.

    Args:
        style: a key of `DRAWERS`.
        title: two words, which meet in the middle, so that each looks the same whatever the other is.
        numbers: whether the values are written; lists and pies always have them.
        inks: one for all names, or one for each.
    """
    figure = new_figure(side)
    size = points(_TYPE * side / CELLS)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, CELLS)
    axes.set_ylim(CELLS, 0)
    axes.set_axis_off()
    place, subject = title.split()
    axes.text(CELLS / 2 - _GAP, 0.5, place, ha="right", va="center", fontsize=size)
    axes.text(CELLS / 2 + _GAP, 0.5, subject, ha="left", va="center", fontsize=size)
    inks = [inks[i % len(inks)] for i in range(len(names))]
    texts = [str(value) if numbers else "" for value in values]
    DRAWERS[style](axes, names, values, texts, inks, size)
    return drawn(figure, tight=False)


def _upright(axes: Any, names: Sequence[str], texts: Sequence[str], size: float) -> list[float]:
    """Names and numbers in a row below; returns the middle of each column."""
    start = (CELLS - len(names)) // 2
    middles = [start + i + 0.5 for i in range(len(names))]
    for x, name, text in zip(middles, names, texts, strict=True):
        axes.text(x, 5.28, name, ha="center", va="center", fontsize=size * 0.9)
        axes.text(x, 5.72, text, ha="center", va="center", fontsize=size)
    return middles


def _bar(
    axes: Any, names: Sequence[str], values: Sequence[int], texts: Sequence[str], inks: Sequence[str], size: float
) -> None:
    heights = [3.8 * value / max(values) for value in values]
    bottoms = [5 - height for height in heights]
    axes.bar(_upright(axes, names, texts, size), heights, bottom=bottoms, color=inks, width=0.7)


def _line(
    axes: Any, names: Sequence[str], values: Sequence[int], texts: Sequence[str], inks: Sequence[str], size: float
) -> None:
    heights = [4.9 - 3.6 * value / max(values) for value in values]
    axes.plot(_upright(axes, names, texts, size), heights, marker="o", markersize=size / 2, color=inks[0])


def _rows(axes: Any, names: Sequence[str], texts: Sequence[str], left: float, size: float) -> None:
    for i, (name, text) in enumerate(zip(names, texts, strict=True)):
        axes.text(left, i + 1.5, name, ha="left", va="center", fontsize=size)
        axes.text(_RIGHT, i + 1.5, text, ha="right", va="center", fontsize=size)


def _flat_bar(
    axes: Any, names: Sequence[str], values: Sequence[int], texts: Sequence[str], inks: Sequence[str], size: float
) -> None:
    _rows(axes, names, texts, _LEFT, size)
    widths = [3.3 * value / max(values) for value in values]
    axes.barh([i + 1.5 for i in range(len(names))], widths, left=1.6, color=inks, height=0.7)


def _list(
    axes: Any, names: Sequence[str], values: Sequence[int], texts: Sequence[str], inks: Sequence[str], size: float
) -> None:
    _rows(axes, names, texts, _LEFT, size)
    for i in range(len(names) + 1):
        axes.axhline(i + 1, color=inks[0], linewidth=0.8)


def _pie(
    axes: Any, names: Sequence[str], values: Sequence[int], texts: Sequence[str], inks: Sequence[str], size: float
) -> None:
    """Clockwise from the top, with a legend."""
    _rows(axes, names, texts, CELLS / 2 + _LEFT, size)
    angle = -90.0
    for i, (value, ink) in enumerate(zip(values, inks, strict=True)):
        slice_ = 360 * value / sum(values)
        axes.add_patch(Wedge((1.35, 3.5), 1.25, angle, angle + slice_, color=ink))
        axes.add_patch(Rectangle((2.8, i + 1.4), 0.2, 0.2, color=ink))
        angle += slice_


DRAWERS: dict[str, Callable[..., None]] = {
    "bar": _bar,
    "flat bar": _flat_bar,
    "line": _line,
    "pie": _pie,
    "list": _list,
}
