"""Made charts: bars, lines, pies and ruled lists of a few named numbers under a title, and questions on them.

Held out for tests are a fifth of the titles, and a sixth of all pairs of a name and its value. A chart of the split
"train" has none of these and one of the split "new" has nothing else: its title, and each value beside its name, have
never been seen in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Any, Literal

from PIL import Image

from . import small_charts
from .figures import INKS, NOUNS, PLACES, Structured, drawn, new_figure, points
from .words import Question

Split = Literal["train", "new"]

SUBJECTS = ("sales", "stock", "harvest", "orders")
TITLES = tuple(f"{place} {subject}" for place in PLACES for subject in SUBJECTS)
VALUES = range(2, 60)
SMALL_VALUES = range(2, 21)
"""Of charts below `SMALL_SIDE`."""
STYLES = ("bar", "flat bar", "line", "pie", "list")
QUESTIONS = ("largest", "smallest", "larger", "value", "count", "title")
SMALL_SIDE = 224
"""Below this many pixels charts are drawn by `small_charts`, with at most five names of at most five letters."""

_MOST = 6
_GAP = 0.06
"""Share of the largest value by which those differ that a question compares: one can see it."""

_SLICE = 0.07
"""Share of the smallest slice of a pie, beside which there is room for its name."""


def title_is_held_out(title: str) -> bool:
    return sha256(title.encode()).digest()[0] < 52


def pair_is_held_out(name: str, value: int) -> bool:
    return sha256(f"{name} {value}".encode()).digest()[0] < 43


@dataclass(frozen=True)
class ChartData:
    """What a chart shows.

    Args:
        title: one of `TITLES`.
        names, values: in the order in which they are drawn; the values differ, the two largest and the two smallest
            visibly so.
        possible: what values could have been.
    """

    title: str
    names: tuple[str, ...]
    values: tuple[int, ...]
    possible: range = VALUES

    def text(self, numbers: bool = True) -> str:
        """As a table in markdown; without `numbers`, of the names alone."""
        rows = (f"| {n} | {v} |" if numbers else f"| {n} |" for n, v in zip(self.names, self.values, strict=True))
        head = "| item | value |\n|---|---|" if numbers else "| item |\n|---|"
        return "\n".join((f"# {self.title}", "", head, *rows))

    def questions(self, rng: Random, numbers: bool = True) -> tuple[Question, ...]:
        """One question of each of `QUESTIONS`, in any order; without `numbers`, none for a value."""
        names, values = self.names, dict(zip(self.names, self.values, strict=True))
        ranked = sorted(names, key=values.__getitem__)
        one, (a, b) = rng.choice(names), rng.choice(self._comparable())
        asked = [
            _question("largest", "which is the largest", ranked[-1], names, "the largest is {}"),
            _question("smallest", "which is the smallest", ranked[0], names, "the smallest is {}"),
            _question("larger", f"which is larger, {a} or {b}", max(a, b, key=values.__getitem__), (a, b),
                      f"of {a} and {b} the larger is {{}}"),
            _question("count", "how many items are there", str(len(names)), tuple("3456"), "there are {}"),
            _question("title", "what is the title", self.title, TITLES, "the title is {}"),
        ]  # fmt: skip
        if numbers:
            form = f"the value of {one} is {{}}"
            choices = tuple(map(str, self.possible))
            asked.append(_question("value", f"what is the value of {one}", str(values[one]), choices, form))
        rng.shuffle(asked)
        return tuple(asked)

    def _comparable(self) -> list[tuple[str, str]]:
        pairs = list(zip(self.names, self.values, strict=True))
        gap = _GAP * max(self.values)
        return [(a, b) for a, x in pairs for b, y in pairs if abs(x - y) >= gap and a != b]


def _question(kind: str, question: str, answer: str, choices: tuple[str, ...], form: str) -> Question:
    return Question(kind=kind, question=question, answer=answer, choices=choices, form=form)


def chart_data(
    rng: Random, split: Split = "train", small: bool = False, share: float = 0.0, possible: range = VALUES
) -> ChartData:
    """A title and three to six numbers, each a `possible` one and at least the `share` of their sum, with names; or as
    many names, and as long, as a `small` picture has room for."""
    held_out = split == "new"
    title = rng.choice([title for title in TITLES if title_is_held_out(title) == held_out])
    allowed = {noun: [v for v in possible if pair_is_held_out(noun, v) == held_out] for noun in NOUNS}
    nouns = [noun for noun in NOUNS if allowed[noun] and not (small and len(noun) > 5)]
    names = rng.sample(nouns, rng.randint(3, small_charts.MOST_ROWS if small else _MOST))
    for _ in range(1000):
        values = [rng.choice(allowed[name]) for name in names]
        ranked = sorted(values)
        gap = _GAP * ranked[-1]
        visible = min(ranked[-1] - ranked[-2], ranked[1] - ranked[0]) >= gap
        if visible and len(set(values)) == len(values) and ranked[0] >= share * sum(values):
            return ChartData(title, tuple(names), tuple(values), possible)
    # The few values that are held out with these names are too much alike.
    return chart_data(rng, split, small, share, possible)


def values_at(side: int) -> range:
    """The possible values of charts of `side` pixels."""
    return SMALL_VALUES if side < SMALL_SIDE else VALUES


def chart(rng: Random, style: str | None = None, side: int = 336, split: Split = "train") -> Structured:
    """A chart, its table as markdown, and questions on it. Some bars and lines have no numbers: then the table has
    none, and no question asks for one.

    Args:
        style: one of `STYLES`; None for any.
        side: of the picture in pixels; see `SMALL_SIDE`.
        split: see the head of this file.

    Raises:
        ValueError: no such style.
    """
    style = style or rng.choice(STYLES)
    if style not in STYLES:
        raise ValueError(f"no chart style {style!r}; there are {', '.join(STYLES)}")
    small = side < SMALL_SIDE
    data = chart_data(rng, split, small, _SLICE if style == "pie" else 0.0, values_at(side))
    numbers = style in ("pie", "list") or rng.random() < 0.75
    inks = rng.sample(INKS, len(data.names)) if style == "pie" or rng.random() < 0.5 else [rng.choice(INKS)]
    if small:
        picture = small_charts.draw(style, data.title, data.names, data.values, numbers, inks, side)
    else:
        picture = _draw(style, data, numbers, inks, side, rng)
    return Structured(picture, data.text(numbers), "markdown", data.questions(rng, numbers), style)


def _draw(style: str, data: ChartData, numbers: bool, inks: Sequence[str], side: int, rng: Random) -> Image.Image:
    look = _Look(
        numbers=numbers,
        size=points(min(side * 0.07, 15.0)),
        inks=inks,
        axes=rng.random() < 0.7,
        grid=rng.random() < 0.5,
        marker=rng.choice("os^"),
    )
    figure = new_figure(side)
    figure.text(0.5, 0.94, data.title, ha="center", va="center", fontsize=look.size * 1.15)
    axes = figure.add_axes((0.14, 0.13, 0.83, 0.75) if look.axes else (0.03, 0.11, 0.94, 0.76))
    _DRAWERS[style](axes, data, look)
    return drawn(figure, tight=False)


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What no question asks for; `size` is that of the type in points."""

    numbers: bool
    size: float
    inks: Sequence[str]
    axes: bool
    grid: bool
    marker: str


def _upright(axes: Any, data: ChartData, look: _Look) -> None:
    """Room, names and numbers of bars and lines."""
    top = max(data.values) * 1.2
    axes.set_ylim(0, top)
    axes.set_xlim(-0.5, len(data.names) - 0.5)
    for i, (name, value) in enumerate(zip(data.names, data.values, strict=True)):
        axes.text(i, -0.03 * top, name, ha="center", va="top", fontsize=look.size)
        if look.numbers:
            axes.text(i, value + 0.05 * top, str(value), ha="center", va="bottom", fontsize=look.size)
    axes.set_xticks([])
    if not look.axes:
        axes.set_axis_off()
    elif look.grid:
        axes.grid(axis="y", alpha=0.4)


def _bar(axes: Any, data: ChartData, look: _Look) -> None:
    axes.bar(range(len(data.names)), data.values, color=look.inks, width=0.7)
    _upright(axes, data, look)


def _line(axes: Any, data: ChartData, look: _Look) -> None:
    axes.plot(range(len(data.names)), data.values, marker=look.marker, color=look.inks[0])
    _upright(axes, data, look)


def _flat_bar(axes: Any, data: ChartData, look: _Look) -> None:
    """Bars from left to right; the first is the topmost."""
    far = max(data.values)
    axes.barh(range(len(data.names)), data.values, color=look.inks, height=0.7)
    axes.set_ylim(len(data.names) - 0.5, -0.5)
    axes.set_xlim(-0.45 * far, 1.2 * far)
    for i, (name, value) in enumerate(zip(data.names, data.values, strict=True)):
        axes.text(-0.02 * far, i, name, ha="right", va="center", fontsize=look.size)
        if look.numbers:
            axes.text(value + 0.02 * far, i, str(value), ha="left", va="center", fontsize=look.size)
    axes.set_axis_off()


def _pie(axes: Any, data: ChartData, look: _Look) -> None:
    """Clockwise from the top."""
    labels = [f"{name}\n{value}" for name, value in zip(data.names, data.values, strict=True)]
    axes.pie(
        data.values, labels=labels, colors=look.inks, radius=0.75, labeldistance=1.35, startangle=90,
        counterclock=False, textprops={"fontsize": look.size, "ha": "center", "va": "center"},
    )  # fmt: skip


def _list(axes: Any, data: ChartData, look: _Look) -> None:
    """Names and numbers in rows with a rule above each."""
    rows = len(data.names)
    axes.set_xlim(0, 1)
    axes.set_ylim(rows, 0)
    for i, (name, value) in enumerate(zip(data.names, data.values, strict=True)):
        axes.axhline(i, color=look.inks[0], linewidth=0.8)
        axes.text(0.1, i + 0.5, name, ha="left", va="center", fontsize=look.size)
        axes.text(0.9, i + 0.5, str(value), ha="right", va="center", fontsize=look.size)
    axes.set_axis_off()


_DRAWERS: dict[str, Callable[[Any, ChartData, _Look], None]] = {
    "bar": _bar,
    "flat bar": _flat_bar,
    "line": _line,
    "pie": _pie,
    "list": _list,
}
