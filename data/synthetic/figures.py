"""What made charts, tables and other structured pictures have in common: their words, inks, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .words import Question

NOUNS = (
    *("apples", "bread", "cars", "dogs", "eggs", "fish", "grapes", "houses", "ink", "jam", "kites", "lamps", "milk"),
    *("nuts", "oil", "pears", "rice", "salt", "tea", "wine", "wool", "books", "chairs", "paper", "sugar", "trees"),
)
"""What is counted in charts and tables."""
PLACES = ("north", "south", "east", "west", "town", "coast", "hills", "lake")
STEPS = ("wash", "cut", "mix", "bake", "cool", "pack", "weigh", "test", "sort", "label", "ship", "store")
INKS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#e377c2")

_DPI = 100


@dataclass(frozen=True)
class Structured:
    """A picture and its text.

    Args:
        picture: RGB.
        text: markdown or LaTeX that says all that the picture shows.
        format: "markdown", "latex", "mermaid" or "plain".
        questions: with one right answer each; charts have some.
        style: of a chart, how it is drawn.
    """

    picture: Image.Image
    text: str
    format: str
    questions: tuple[Question, ...] = ()
    style: str = ""


def new_figure(side: int, tall: float = 1.0) -> Figure:
    """A figure of `side` pixels' width and `tall` times that height, at least a fifth."""
    figure = Figure(figsize=(side / _DPI, max(0.2, tall) * side / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def points(pixels: float) -> float:
    """The size of type of so many pixels, as matplotlib counts it."""
    return pixels * 72 / _DPI


def drawn(figure: Figure, tight: bool = True) -> Image.Image:
    """The figure as RGB; `tight` moves its axes so that all that stands around them is in the picture."""
    if tight:
        figure.tight_layout()
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
