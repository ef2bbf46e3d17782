"""`herdkit evaluate`: a model's answers to questions in shards, by the rules of the benchmarks."""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.command_line import add_command
from ..data.dialogs import MEDIA_TYPES
from ..data.shards import ShardReader
from ..train.files import write_bytes
from ..train.progress import ProgressLine
from .dialog_page import STYLE, picture_of
from .evaluate_shards import METRICS, PROMPTS, Marked, Question, Report, as_lines, as_table, marked_answers, report

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
            "answers that are not wholly right. Samples hold in json `messages` that end with the answer, or a\n"
            "`question`, all right answers in `answers`, choices in `options`, the category in `kind`."
        ),
        interrupted="nothing was written",
    )
    add = parser.add_argument
    add("model", type=Path, help="model directory")
    add("shards", help="files, folders, URLs, or patterns: 'data/test-{000..011}.tar'")
    add("--metric", choices=(*METRICS, "choice", "caption"), default="exact", help="(%(default)s)")
    add("--prompt", default="none", help=f"{', '.join(PROMPTS)}, or a sentence with {{question}} (%(default)s)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for answers, result and gallery")
    add("--without", action="append", default=[], choices=MEDIA_TYPES, help="leave these out, to see what is guessed")
    add("--limit", type=int, metavar="N", help="the first samples only")
    add("--batch-size", type=int, default=16, metavar="N", help="questions decoded together (%(default)s)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (%(default)s)")


def evaluate(options: argparse.Namespace) -> None:
    """`herdkit evaluate`."""
    from .model_directory import load

    template: str = options.prompt
    prompt = PROMPTS.get(template, template)
    if "{question}" not in prompt:
        raise ValueError(f"--prompt: {options.prompt!r} is none of {', '.join(PROMPTS)} and holds no {{question}}")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    samples = ShardReader(options.shards)
    model = load(options.model)
    found: list[tuple[Question, Marked]] = []
    count = min(len(samples), options.limit or len(samples))
    with ProgressLine("asking", count) as line:
        settings = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
        asked = marked_answers(
            model, samples, options.metric, prompt=prompt, without=options.without, limit=options.limit, **settings
        )
        for pair in asked:
            found.append(pair)
            line.update(len(found), "")
    answers = [answer for _, answer in found]
    made = report(answers, options.metric)
    options.out.mkdir(parents=True, exist_ok=True)
    settings |= {"model": str(options.model), "shards": options.shards, "prompt": prompt, "without": options.without}
    result = {**asdict(made), **settings}
    write_bytes(options.out / "answers.jsonl", as_lines(answers).encode())
    write_bytes(options.out / "result.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    write_bytes(options.out / "wrong.html", gallery(found, made).encode())
    print(as_table(made))
    print(json.dumps({"score": made.mean.score, "interval": made.mean.interval, "count": made.mean.count,
                      "out": str(options.out)}))  # fmt: skip


def gallery(found: Sequence[tuple[Question, Marked]], made: Report) -> str:
    """Answers that are not wholly right, the worst first, with what was asked about, as a page without scripts."""
    wrong = sorted((pair for pair in found if pair[1].score < 1), key=lambda pair: pair[1].score)
    sections = []
    for question, answer in wrong[:GALLERY]:
        pictures = "".join(f"<figure>{picture_of(part)}</figure>" for part in question.media)
        right = " · ".join(dict.fromkeys(answer.answers))
        told = f" <small>taken for {answer.understood!r}</small>" if answer.options else ""
        sections.append(
            f"<h2>{html.escape(answer.key)}<small>{html.escape(answer.kind)} {100 * answer.score:.0f}%</small></h2>"
            f"{pictures}<div class='message user'>{html.escape(question.prompt[-1].text)}</div>"
            f"<div class='message assistant'>{html.escape(answer.given) or '(nothing)'}{told}</div>"
            f"<p>right: {html.escape(right)}</p>"
        )
    shown = f", of which {GALLERY} are shown" if len(wrong) > GALLERY else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Wrong answers</title><style>{STYLE}</style>'
        f"<body><h1>{len(wrong)} of {len(found)} answers are not wholly right{shown}</h1>"
        f"<pre>{html.escape(as_table(made))}</pre>{''.join(sections)}</body></html>\n"
    )
