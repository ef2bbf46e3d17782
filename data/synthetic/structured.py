"""Made pictures of what documents hold, with the text that they were made from: tables, flowcharts, equations and
paragraphs, as markdown, LaTeX, Mermaid or plain text (section 7.1.1: structured images of the annealing set). Charts
are in `charts`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import matplotlib
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont

from .figures import INKS, NOUNS, PLACES, STEPS, Structured, drawn, new_figure


def table(rng: Random, side: int = 336, format: str | None = None) -> Structured:
    """A table of 2 to 4 columns and 2 to 6 rows, as markdown or LaTeX."""
    columns = ["item", *rng.sample(PLACES, rng.randint(1, 3))]
    rows = [[name, *(str(rng.randint(0, 999)) for _ in columns[1:])] for name in rng.sample(NOUNS, rng.randint(2, 6))]
    format = format or rng.choice(("markdown", "latex"))
    figure = new_figure(side, tall=0.14 * (len(rows) + 2))
    axes = figure.add_subplot()
    axes.axis("off")
    cells = axes.table(rows, colLabels=columns, loc="center", cellLoc=rng.choice(("left", "center", "right")))
    cells.scale(1, 1.4)
    if format == "markdown":
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    else:
        body = " \\\\\n".join(" & ".join(line) for line in (columns, *rows))
        text = f"\\begin{{tabular}}{{{'l' * len(columns)}}}\n{body}\n\\end{{tabular}}"
    return Structured(drawn(figure), text, format)


def equation(rng: Random, side: int = 336) -> Structured:
    """An equation of a few terms, as LaTeX."""
    left = f"{rng.choice('fghu')}({rng.choice('xyz')})"
    text = f"{left} = {' '.join(_terms(rng, rng.randint(2, 4)))}"
    figure = new_figure(side, tall=0.3)
    figure.text(0.5, 0.5, f"${text}$", ha="center", va="center", fontsize=rng.choice((14, 16, 18)))
    return Structured(drawn(figure, tight=False), text, "latex")


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
    figure = new_figure(side)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(steps) - 0.5)
    middle = [(0.45, len(steps) - 1 - i) for i in range(len(steps))]
    ink = rng.choice(INKS)
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
    return Structured(drawn(figure), f"flowchart TD\n{lines}", "mermaid")


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
    "tables": table,
    "equations": equation,
    "flowcharts": flowchart,
    "paragraphs": paragraph,
}
"""By kind."""
