"""`herdkit evaluate`: a model's answers to questions in shards, by the rules of the benchmarks."""

from __future__ import annotations

import argparse
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.command_line import add_command
from ..data.dialogs import MEDIA_TYPES
from ..data.shards import ShardReader
from ..train.files import write_json, write_text
from ..train.journal import Journal
from ..train.progress import ProgressLine
from .compose import ComposedModel
from .dialog_page import STYLE, picture_of
from .evaluate import Samples, size
from .evaluate_questions import PROMPTS, media_of
from .evaluate_shards import METRICS, Evaluation, Marked, Report, as_table, report

GALLERY = 200
"""Wrong answers on the page at most."""


def add_evaluate_command(commands: Any) -> None:
    """Adds `evaluate` to the sub-parsers of `herdkit`."""
    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "Ask a model the questions of shards and score its answers by the rules of a benchmark.",
        [
            "herdkit evaluate runs/tiny-herd/model 'data/docvqa/*.tar' --metric anls --prompt short --out runs/docvqa",
            "herdkit evaluate runs/tiny-herd/model 'data/tvqa/*.tar' --metric choice --prompt choice --out runs/tvqa",
        ],
        details=(
            "Writes answers.jsonl (prompts and token ids included), result.json and wrong.html, a gallery of\n"
            "answers that are not wholly right. Stopped at any time, the same command goes on. Samples hold in json\n"
            "`messages` that end with the answer, or a `question` about their other members, all right answers in\n"
            "`answers`, the possible ones in `choices`, the category in `kind`."
        ),
    )
    add = parser.add_argument
    add("model", type=Path, help="model directory")
    add("shards", help="files, folders, URLs, or patterns: 'data/test-{000..011}.tar'")
    add("--metric", choices=(*METRICS, "choice", "caption"), default="exact", help="(%(default)s)")
    add(
        "--prompt",
        default="none",
        help=f"{', '.join(PROMPTS)}, or a sentence with {{question}} and perhaps {{choices}} (%(default)s)",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="for answers, result and gallery")
    add("--without", action="append", default=[], choices=MEDIA_TYPES, help="leave these out, to see what is guessed")
    add("--limit", type=int, metavar="N", help="the first samples only")
    add("--batch-size", type=int, default=16, metavar="N", help="questions decoded together (%(default)s)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (%(default)s)")


def evaluate(options: argparse.Namespace) -> None:
    """`herdkit evaluate`."""
    from .model_directory import load

    template: str = options.prompt
    evaluation = Evaluation(
        metric=options.metric,
        prompt=PROMPTS.get(template, template),
        without=options.without,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    samples = ShardReader(options.shards)
    count = size(samples, options.limit)
    names = hashlib.sha256(json.dumps([samples.name(i) for i in range(count)]).encode()).hexdigest()
    settings = {"model": str(options.model.resolve()), "shards": options.shards, "limit": options.limit}
    settings |= asdict(evaluation)
    journal = Journal(options.out / "answers.jsonl", {**settings, "samples": names})
    if journal.out.exists():
        done = journal.read()
    else:
        model = load(options.model)
        check(evaluation, model, samples, count)
        done = journal.read()
        with ProgressLine("asking", count, len(done)) as line:
            for batch in evaluation.batches(model, samples, options.limit, {int(id) for id in done}):
                new = {answer.id: asdict(answer) for answer in batch if answer.id not in done}
                journal.append(list(new.values()))
                done |= new
                line.update(len(done), "")
        journal.finish([done[position] for position in range(count)])
    answers = [Marked(**done[position]) for position in range(count)]
    made = report(answers, options.metric)
    write_json(options.out / "result.json", {**asdict(made), **settings})
    write_text(options.out / "wrong.html", gallery(answers, made, samples))
    print(as_table(made))
    print(json.dumps({"score": made.mean.score, "interval": made.mean.interval, "count": made.mean.count,
                      "out": str(options.out)}))  # fmt: skip


def check(evaluation: Evaluation, model: ComposedModel, samples: Samples, count: int) -> None:
    """Reads every question before the first is asked.

    Raises:
        ValueError: see `Evaluation.question`.
    """
    with ProgressLine("checking", count) as line:
        for position in range(count):
            evaluation.question(model, samples[position])
            line.update(position + 1, "")


def gallery(found: Sequence[Marked], made: Report, samples: Samples) -> str:
    """Answers that are not wholly right, the worst first, with what was asked about, as a page without scripts."""
    wrong = sorted((answer for answer in found if answer.score < 1), key=lambda answer: answer.score)
    sections = []
    for answer in wrong[:GALLERY]:
        pictures = "".join(f"<figure>{picture_of(part)}</figure>" for part in media_of(samples[answer.id]))
        right = " · ".join(dict.fromkeys(answer.answers))
        told = ""
        if made.metric == "choice":
            meant = "could not be told" if answer.understood is None else f"taken for {answer.understood}"
            told = f" <small>{html.escape(meant)}</small>"
        sections.append(
            f"<h2>{html.escape(answer.key)}<small>{html.escape(answer.kind)} {100 * answer.score:.0f}%</small></h2>"
            f"{pictures}<div class='message user'>{html.escape(answer.question)}</div>"
            f"<div class='message assistant'>{html.escape(answer.given) or '(nothing)'}{told}</div>"
            f"<p>right: {html.escape(right)}</p>"
        )
    shown = f", of which {GALLERY} are shown" if len(wrong) > GALLERY else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Wrong answers</title><style>{STYLE}</style>'
        f"<body><h1>{len(wrong)} of {len(found)} answers are not wholly right{shown}</h1>"
        f"<pre>{html.escape(as_table(made))}</pre>{''.join(sections)}</body></html>\n"
    )
