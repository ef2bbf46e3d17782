"""Reading charts that were never seen: a tiny language model that answers questions on written tables stays frozen, and
an image encoder and adapter are trained to see the charts for it.

python -m herdkit.demos.charts --out runs/charts

Titles, and which value stands beside which name, are held out. Each test question is asked with its picture, without
any, and with the picture of another chart. A killed run goes on from its last finished point.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..adapters.compose import ComposedModel
from ..adapters.evaluate import Answer, Samples, Score, answers, score, score_by_kind
from ..adapters.model_directory import load
from ..data.shards import Sample, ShardReader
from ..data.synthetic.sets import build_annealing
from ..train.config import load_recipe
from ..train.files import write_json
from ..train.recipe import StageRecipe
from .chain import Chain, Link

CHAIN = (
    Link(
        name="text-pretrain",
        title="language model: tables",
        recipe="text/recipes/tiny_charts_pretrain.yaml",
        alone=True,
    ),
    Link(
        name="text-sft",
        title="language model: questions",
        recipe="text/recipes/tiny_charts_sft.yaml",
        alone=True,
    ),
    Link(
        name="image-pretrain",
        title="image adapter: tables of charts",
        recipe="vision/recipes/tiny_charts_pretrain.yaml",
        alone=True,
    ),
    Link(
        name="image-sft",
        title="image adapter: questions on charts",
        recipe="vision/recipes/tiny_charts_sft.yaml",
        alone=True,
    ),
)
SIDE = 192


def run(out: Path, seed: int = 0, *, written: int = 12_000, charts: int = 8_000, held_out: int = 600) -> dict[str, Any]:
    """Makes the data, trains the chain and examines its model.

    Args:
        out: folder of data, stages and results.
        seed: of data, weights and order.
        written, charts: to train on.
        held_out: charts to ask about, a question each.
    """
    console, started = Console(stderr=True), time.monotonic()
    build_annealing(out / "data", {"written_charts": written, "charts": charts}, seed, side=SIDE)
    build_annealing(out / "data", {"charts": held_out}, seed, side=SIDE, held_out=True)
    given = [f"root={out}", f"trainer.seed={seed}", f"data.seed={seed}"]

    def recipe(link: Link) -> StageRecipe:
        return load_recipe(link.path, link.stage.recipe, given)

    Chain(CHAIN, out / "stages", recipe, console, before_training=lambda: None).train()
    model = load(out / "stages" / CHAIN[-1].name / "model")
    texts, questions = (
        ShardReader(str(out / "data" / f"chart_{name}_new" / "*.tar")) for name in ("texts", "questions")
    )
    results = {"seed": seed, "cells": read_tables(model, texts), **examine(model, questions)}
    results["seconds"] = round(time.monotonic() - started)
    write_json(out / "results.json", results)
    return results


@dataclass(frozen=True)
class Swapped:
    """The same questions, each on the picture of the next sample."""

    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        sample, other = self.samples[index], self.samples[(index + 1) % len(self)]
        return Sample(sample.key, sample.shard, {**sample.members, "png": other.members["png"]})


def examine(model: ComposedModel, samples: Samples) -> dict[str, Any]:
    """How many questions are answered right by kind, and by style of the chart, and what is left of that without the
    pictures and with the pictures of others."""
    seen = list(answers(model, samples))
    found = {
        "picture": seen,
        "none": list(answers(model, samples, without=("image",))),
        "another": list(answers(model, Swapped(samples))),
    }
    styles = [samples[i].json()["style"] for i in range(len(samples))]
    by_style = {style: score_by_kind([a for a in seen if styles[a.index] == style]) for style in sorted(set(styles))}
    return {
        "all": table_row({name: score(given) for name, given in found.items()}),
        "kinds": {
            kind: table_row({name: score_by_kind(given)[kind] for name, given in found.items()})
            for kind in score_by_kind(seen)
        },
        "styles": {
            style: {"all": score([a for a in seen if styles[a.index] == style]).accuracy}
            | {kind: one.accuracy for kind, one in kinds.items()}
            for style, kinds in by_style.items()
        },
        "wrong": [wrong(answer) for answer in seen if not answer.right][:20],
    }


def read_tables(model: ComposedModel, samples: Samples) -> dict[str, Any]:
    """The shares of titles, names and values that stand at their place in the tables which the model writes down, and
    what is left of that without the pictures and with the pictures of others."""
    found = {
        "picture": answers(model, samples, max_new_tokens=80),
        "none": answers(model, samples, without=("image",), max_new_tokens=80),
        "another": answers(model, Swapped(samples), max_new_tokens=80),
    }
    return {name: cells_right([(cells(a.expected), cells(a.given)) for a in given]) for name, given in found.items()}


def cells(table: str) -> dict[tuple[str, int], str]:
    """What stands in a table in markdown, by what it is ("title", "name" or "value") and its row."""
    title, *rest = table.splitlines() or [""]
    found = {("title", 0): title}
    for row, line in enumerate(rest[3:]):
        for what, cell in zip(("name", "value"), line.strip("| ").split(" | "), strict=False):
            found[what, row] = cell
    return found


def cells_right(tables: Sequence[tuple[dict[tuple[str, int], str], dict[tuple[str, int], str]]]) -> dict[str, float]:
    """By what it is, the share of the expected cells of all tables that the given ones have as well."""
    right = {"title": [], "name": [], "value": []}
    for expected, given in tables:
        for place, cell in expected.items():
            right[place[0]].append(given.get(place) == cell)
    return {what: sum(hits) / max(1, len(hits)) for what, hits in right.items()}


def table_row(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Accuracies with each picture; count, interval and chance are of the true one."""
    true = scores["picture"]
    row = {"count": true.count, "chance": true.chance, "interval": true.interval}
    return row | {name: one.accuracy for name, one in scores.items()}


def wrong(answer: Answer) -> dict[str, str]:
    return {"asked": answer.prompt, "expected": answer.expected, "given": answer.given}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/charts"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = run(options.out.resolve(), options.seed)
    for kind, row in {**results["kinds"], "all": results["all"]}.items():
        print(
            f"{kind}: {row['picture']:.1%} ± {row['interval']:.1%} of {row['count']}, chance {row['chance']:.1%}, "
            f"without the picture {row['none']:.1%}, with another chart's {row['another']:.1%}"
        )
    for name, row in results["cells"].items():
        print(f"tables written down, picture: {name}: " + ", ".join(f"{what}s {one:.1%}" for what, one in row.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
