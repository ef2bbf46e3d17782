"""Makes the samples of the sets that annealing adds to captions (section 7.1.1): charts, tables, equations, flowcharts,
paragraphs, scenes with boxes, and web pages. As in `herdkit.data.synthetic.samples`, what a function makes depends on
its arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from . import charts, encoding, grounding, screenshots, structured
from .figures import NOUNS, Structured
from .samples import Made
from .words import typed

TRANSCRIBE = {
    "markdown": "write this in markdown",
    "latex": "write this in latex",
    "mermaid": "write this in mermaid",
    "plain": "write what stands here",
}
"""What the user asks for, by format."""


def drawn_charts(
    sets: Sequence[str], seed: int, start: int, stop: int, *, split: charts.Split, side: int
) -> list[Made]:
    """Of each chart a sample that asks for its table, in the first set, and one with questions, in the second: all
    questions on charts to train with, one question and its possible answers on the others."""
    transcribed, questioned = sets
    made: list[Made] = []
    for index in range(start, stop):
        rng = Random(f"{seed}/chart/{split}/{index}")
        chart = charts.chart(rng, side=side, split=split)
        png, key = encoding.png(chart.picture), f"{index:06d}"
        made.append((transcribed, key, _transcription(chart, png, "chart")))
        asked = chart.questions[:1] if split == "new" else chart.questions
        messages: list[dict[str, Any]] = []
        for question in asked:
            messages += _turn(typed(question.question, rng), question.sentence, first=not messages)
        content: dict[str, Any] = {"messages": messages, "style": chart.style}
        if split == "new":
            content |= {"kind": asked[0].kind, "choices": asked[0].sentences, "answer": asked[0].answer}
        made.append((questioned, key, {"png": png, "json": content}))
    return made


def written_charts(sets: Sequence[str], seed: int, start: int, stop: int, *, side: int) -> list[Made]:
    """Tables of charts of the split "train" in writing, with questions on them, so that a language model learns what
    there is to answer before it sees a picture. Their names and values are those of charts of `side` pixels.

    Two more questions ask for the catalogue number of a name, which follows from the name alone and is beyond all
    values: on these a model soon learns to carry the name to where its number is said, as it must for a value in a
    picture. To look values up in the table itself takes it more updates than the chart demo has."""
    made: list[Made] = []
    for index in range(start, stop):
        rng = Random(f"{seed}/written chart/{index}")
        data = charts.chart_data(rng, small=side < charts.SMALL_SIDE, possible=charts.values_at(side))
        numbers = rng.random() < 0.85
        text = data.text(numbers)
        asked = [one for one in data.questions(rng, numbers) if numbers or one.kind in ("count", "title")]
        pairs = [(question.question, question.sentence) for question in asked]
        pairs += [
            (f"what is the number of {name}", f"the number of {name} is {charts.VALUES.stop + NOUNS.index(name)}")
            for name in rng.sample(data.names, 2)
        ]
        rng.shuffle(pairs)
        messages: list[dict[str, Any]] = []
        for question, sentence in pairs:
            words = typed(question, rng)
            content = words if messages else f"{text}\n\n{words}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": sentence}]
        said = "\n".join((text, "", *(f"{question}? {sentence}" for question, sentence in pairs)))
        made.append((sets[0], f"{index:06d}", {"txt": said, "json": {"messages": messages}}))
    return made


def structured_pictures(sets: Sequence[str], seed: int, start: int, stop: int, *, kind: str, side: int) -> list[Made]:
    made: list[Made] = []
    for index in range(start, stop):
        picture = structured.MAKERS[kind](Random(f"{seed}/structured/{kind}/{index}"), side=side)
        members = _transcription(picture, encoding.png(picture.picture), kind.removesuffix("s"))
        made.append((sets[0], f"{index:06d}", members))
    return made


def grounded_scenes(sets: Sequence[str], seed: int, start: int, stop: int, *, split: charts.Split) -> list[Made]:
    return [(sets[0], f"{index:06d}", grounding.sample(seed, index, split)) for index in range(start, stop)]


def pages(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    return [(sets[0], f"{index:06d}", screenshots.sample(seed, index)) for index in range(start, stop)]


def _transcription(made: Structured, png: bytes, kind: str) -> dict[str, Any]:
    content = {"messages": _turn(TRANSCRIBE[made.format], made.text, first=True), "kind": kind}
    return {"png": png, "txt": made.text, "json": content}


def _turn(asked: str, said: str, first: bool) -> list[dict[str, Any]]:
    picture = [{"type": "image", "image": "png"}] if first else []
    user = {"role": "user", "content": [*picture, {"type": "text", "text": asked}]}
    return [user, {"role": "assistant", "content": said}]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What `herdkit.data.synthetic.sets.build_annealing` can make.

    Args:
        sets: that are made together.
        make: see `herdkit.data.synthetic.sets`.
        split: something is held out, and `make` takes the split.
        sized: `make` takes the side of the pictures.
        job: samples that a process makes at a time.
    """

    sets: tuple[str, ...]
    make: Callable[..., list[Made]]
    options: dict[str, Any] = field(default_factory=dict)
    split: bool = False
    sized: bool = False
    job: int = 100


KINDS = {
    "charts": Kind(sets=("chart_texts", "chart_questions"), make=drawn_charts, split=True, sized=True),
    "written_charts": Kind(sets=("written_charts",), make=written_charts, sized=True),
    **{
        kind: Kind(sets=(kind,), make=structured_pictures, options={"kind": kind}, sized=True)
        for kind in structured.MAKERS
    },
    "grounding": Kind(sets=("grounding",), make=grounded_scenes, split=True),
    # A browser takes a second or two for each.
    "screenshots": Kind(sets=("screenshots",), make=pages, job=5),
}
