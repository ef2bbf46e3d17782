"""Made pictures of what documents hold, with the text that they were made from: charts, tables, flowcharts, equations
and paragraphs with markdown or LaTeX, and questions on charts (section 7.1.1: structured images of the annealing set).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont

from .words import Question

NOUNS = (
    *("apples", "bread", "cars", "dogs", "eggs", "fish", "grapes", "houses", "ink", "jam", "kites", "lamps", "milk"),
    *("nuts", "oil", "pears", "rice", "salt", "tea", "wine", "wool", "books", "chairs", "paper", "sugar", "trees"),
)
"""What is counted in charts and tables."""
PLACES = ("north", "south", "east", "west", "town", "coast", "hills", "lake")
STEPS = ("wash", "cut", "mix", "bake", "cool", "pack", "weigh", "test", "sort", "label", "ship", "store")
CHART_KINDS = ("bar", "line", "pie")

_INKS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#e377c2")


@dataclass(frozen=True)
class Structured:
    """A picture and its text.

    Args:
        picture: RGB.
        text: markdown or LaTeX that says all that the picture shows.
        format: "markdown", "latex", "mermaid" or "plain".
        questions: with one right answer each; charts have some.
    """

    picture: Image.Image
    text: str
    format: str
    questions: tuple[Question, ...] = ()


def chart(rng: Random, kind: str | None = None, side: int = 336) -> Structured:
    """A bar chart, line chart or pie of 3 to 6 whole numbers with names, as markdown and with questions on it.

    Args:
        kind: one of `CHART_KINDS`; None for any.
        side: of the picture in pixels.
    """
    kind = kind or rng.choice(CHART_KINDS)
    names = rng.sample(NOUNS, rng.randint(3, 6))
    values = rng.sample(range(2, 60), len(names))
    title = f"{rng.choice(PLACES)} {rng.choice(('sales', 'stock', 'harvest', 'orders'))}"
    inks = rng.sample(_INKS, len(names))
    figure = _figure(side)
    axes = figure.add_subplot()
    axes.set_title(title)
    if kind == "pie":
        axes.pie(values, labels=[f"{n} {v}" for n, v in zip(names, values, strict=True)], colors=inks)
    else:
        if kind == "bar":
            axes.bar(names, values, color=inks if rng.random() < 0.5 else inks[0])
        else:
            axes.plot(names, values, marker=rng.choice("os^"), color=inks[0])
        if rng.random() < 0.6:
            for i, value in enumerate(values):
                axes.annotate(str(value), (i, value), ha="center", va="bottom")
        if rng.random() < 0.5:
            axes.grid(axis="y", alpha=0.4)
        axes.set_ylim(0, max(values) * 1.15)
        axes.tick_params(axis="x", rotation=30)
    rows = "\n".join(f"| {name} | {value} |" for name, value in zip(names, values, strict=True))
    text = f"# {title}\n\n| item | value |\n|---|---|\n{rows}"
    return Structured(_drawn(figure), text, "markdown", tuple(_chart_questions(rng, names, values)))


def _chart_questions(rng: Random, names: Sequence[str], values: Sequence[int]) -> list[Question]:
    most, least, one = int(np.argmax(values)), int(np.argmin(values)), rng.randrange(len(names))
    among = tuple(names)

    def ask(kind: str, question: str, answer: str, choices: tuple[str, ...], form: str) -> Question:
        return Question(kind=kind, question=question, answer=answer, choices=choices, form=form)

    numbers = tuple(map(str, range(2, 60)))
    asked = [
        ask("largest", "which is the largest", names[most], among, "the largest is {}"),
        ask("smallest", "which is the smallest", names[least], among, "the smallest is {}"),
        ask(
            "value", f"what is the value of {names[one]}", str(values[one]), numbers, f"{names[one]} has the value {{}}"
        ),
        ask("count", "how many items are there", str(len(names)), ("3", "4", "5", "6"), "there are {}"),
    ]
    rng.shuffle(asked)
    return asked


def table(rng: Random, side: int = 336, format: str | None = None) -> Structured:
    """A table of 2 to 4 columns and 2 to 6 rows, as markdown or LaTeX."""
    columns = ["item", *rng.sample(PLACES, rng.randint(1, 3))]
    rows = [[name, *(str(rng.randint(0, 999)) for _ in columns[1:])] for name in rng.sample(NOUNS, rng.randint(2, 6))]
    format = format or rng.choice(("markdown", "latex"))
    figure = _figure(side, tall=0.14 * (len(rows) + 2))
    axes = figure.add_subplot()
    axes.axis("off")
    drawn = axes.table(rows, colLabels=columns, loc="center", cellLoc=rng.choice(("left", "center", "right")))
    drawn.scale(1, 1.4)
    if format == "markdown":
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    else:
        body = " \\\\\n".join(" & ".join(line) for line in (columns, *rows))
        text = f"\\begin{{tabular}}{{{'l' * len(columns)}}}\n{body}\n\\end{{tabular}}"
    return Structured(_drawn(figure), text, format)


def equation(rng: Random, side: int = 336) -> Structured:
    """An equation of a few terms, as LaTeX."""
    left = f"{rng.choice('fghu')}({rng.choice('xyz')})"
    text = f"{left} = {' '.join(_terms(rng, rng.randint(2, 4)))}"
    figure = _figure(side, tall=0.3)
    figure.text(0.5, 0.5, f"${text}$", ha="center", va="center", fontsize=rng.choice((14, 16, 18)))
    return Structured(_drawn(figure, tight=False), text, "latex")


def _terms(rng: Random, count: int) -> list[str]:
    def letter() -> str:
        return rng.choice("abcxyzkn")

    makers: tuple[Callable[[], str], ...] = (
        lambda: rf"\frac{{{letter()}}}{{{rng.randint(2, 9)}}}",
        lambda: rf"{letter()}^{{{rng.randint(2, 5)}}}",
        lambda: rf"\sqrt{{{letter()} + {rng.randint(1, 9)}}}",
        lambda: rf"\sum_{{i=1}}^{{{rng.choice('nmk')}}} {letter()}_{{i}}",
        lambda: rf"\int_{{0}}^{{{rng.randint(1, 9)}}} {letter()} \, d{letter()}",
        lambda: rf"{rng.randint(2, 99)} {letter()}",
        lambda: rf"\{rng.choice(('sin', 'cos', 'log', 'exp'))}({letter()})",
    )
    terms = [rng.choice(makers)()]
    for _ in range(count - 1):
        terms += [rng.choice("+-"), rng.choice(makers)()]
    return terms


def flowchart(rng: Random, side: int = 336) -> Structured:
    """Boxes from top to bottom with arrows, one of them perhaps back, as Mermaid."""
    steps = rng.sample(STEPS, rng.randint(3, 5))
    edges = [(i, i + 1) for i in range(len(steps) - 1)]
    if rng.random() < 0.5:
        last = rng.randrange(2, len(steps))
        edges.append((last, rng.randrange(last - 1)))
    figure = _figure(side)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(steps) - 0.5)
    middle = [(0.45, len(steps) - 1 - i) for i in range(len(steps))]
    ink = rng.choice(_INKS)
    for (x, y), step in zip(middle, steps, strict=True):
        axes.add_patch(FancyBboxPatch((x - 0.18, y - 0.22), 0.36, 0.44, "round,pad=0.02", fc="white", ec=ink, lw=1.5))
        axes.text(x, y, step, ha="center", va="center")
    for a, b in edges:
        (xa, ya), (xb, yb) = middle[a], middle[b]
        if b == a + 1:
            ends, bend = ((xa, ya - 0.26), (xb, yb + 0.26)), "arc3"
        else:
            ends, bend = ((xa + 0.22, ya), (xb + 0.22, yb)), "arc3,rad=0.5"
        axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, connectionstyle=bend, color=ink))
    lines = "\n".join(f"    {steps[a]} --> {steps[b]}" for a, b in edges)
    return Structured(_drawn(figure), f"flowchart TD\n{lines}", "mermaid")


def paragraph(rng: Random, side: int = 336) -> Structured:
    """A few lines of text, dark on light or light on dark, as they stand."""
    words = [rng.choice((*NOUNS, *PLACES, *STEPS, "the", "and", "of", "in", "to")) for _ in range(rng.randint(8, 24))]
    size = rng.choice((15, 18, 22))
    font = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", size)
    lines: list[str] = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > side - 24:
            lines.append(word)
        else:
            lines[-1] = longer
    text = "\n".join(lines)
    paper, ink = rng.choice((("white", "black"), ("#f4ecd8", "#3b2f1e"), ("#20232a", "#e8e8e8")))
    picture = Image.new("RGB", (side, 24 + len(lines) * (size + 8)), paper)
    ImageDraw.Draw(picture).multiline_text((12, 12), text, fill=ink, font=font, spacing=8)
    return Structured(picture, text, "plain")


MAKERS: dict[str, Callable[..., Structured]] = {
    "chart": chart,
    "table": table,
    "equation": equation,
    "flowchart": flowchart,
    "paragraph": paragraph,
}
ASKED = {
    "markdown": "write this in markdown",
    "latex": "write this in latex",
    "mermaid": "write this in mermaid",
    "plain": "write what stands here",
}


def sample(kind: str, seed: int, index: int, side: int = 336) -> dict[str, Any]:
    """The members of one sample: the picture, and a dialog that asks for its text, or, of every second chart, a
    question on it. It depends on the arguments alone."""
    rng = Random(f"{seed}/structured/{kind}/{index}")
    made = MAKERS[kind](rng, side=side)
    asked, said, extra = ASKED[made.format], made.text, {"kind": kind}
    if made.questions and index % 2:
        question = made.questions[0]
        asked, said = question.question, question.sentence
        extra = {"kind": f"{kind} {question.kind}", "choices": question.sentences, "answer": question.answer}
    user = {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": asked}]}
    buffer = io.BytesIO()
    made.picture.save(buffer, "PNG", compress_level=6)
    content = {"messages": [user, {"role": "assistant", "content": said}], **extra}
    return {"png": buffer.getvalue(), "txt": made.text, "json": content}


def _figure(side: int, tall: float = 1.0) -> Figure:
    figure = Figure(figsize=(side / 100, max(0.2, tall) * side / 100), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: Figure, tight: bool = True) -> Image.Image:
    if tight:
        figure.tight_layout()
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
