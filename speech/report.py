"""A page on a file of transcripts: errors by language and length with their intervals, how recordings ended, what is
said where nobody speaks, answers to spoken questions, and the worst ones with spectrograms and words at their times."""

from __future__ import annotations

import base64
import difflib
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..adapters.evaluate_shards import Mean
from ..train.files import write_text
from ..train.run_report import table
from .evaluate import Row, by_group, errors_in, hallucination, length_group, made_silence
from .features import FeatureConfig, log_mel
from .questions import SpokenAnswers, answer_questions, scores
from .transcribe import Transcriber
from .transcribe_files import Recording

WORST = 8
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h2 { margin-top: 2.2rem } h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere }
table { border-collapse: collapse } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top }
tr + tr td { border-top: 1px solid #e4e8ee } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
del { background: #fbdcd9; text-decoration: none } ins { background: #d8f0dd; text-decoration: none }
img { width: 100% } .quiet { color: #667085 }
"""


def write_report(
    out: Path, recordings: Sequence[Recording], transcriber: Transcriber, page: Path, *, questions: bool = False
) -> dict[str, Any]:
    """Writes the page on what `transcribe_files` wrote.

    Args:
        out: that file.
        recordings: it was made of.
        transcriber: is asked about silence and noise.
        questions: the recordings are spoken questions, which its model answers by each route of
            `herdkit.speech.questions`.

    Returns: "error_rate" and "interval" where there are references, "words_in_silence", and "questions", the count,
        accuracy and half its 95% interval by route.

    Raises:
        ValueError: see `answer_questions`.
    """
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    known = [line for line in lines if line.get("reference") and line["status"] in ("ok", "empty", "no speech")]
    language = transcriber.config.language
    said, heard = [line["reference"] for line in known], [line["text"] for line in known]
    languages = [line.get("language", language) for line in known]
    tables = {"language": languages, "length": [length_group(line["seconds"]) for line in known]}
    rows = {name: by_group(groups, said, heard, languages) for name, groups in tables.items()}
    result: dict[str, Any] = {}
    parts = [f"<h1>Transcripts of {html.escape(out.name)}</h1>", _statuses(lines)]
    if known and rows["language"]:
        total = rows["language"][-1]
        result = {"error_rate": total.rate, "interval": total.interval}
        parts += ["<h2>Errors</h2>", "<p class=quiet>Of words; of characters in Chinese, Japanese, Korean and Thai. "
                  "Intervals of 95% are by the bootstrap over recordings.</p>"]  # fmt: skip
        parts += [_errors(name, found) for name, found in rows.items()]
    silence, words = _silence(transcriber)
    result["words_in_silence"] = words
    parts += ["<h2>Where nobody speaks</h2>", silence]
    sources = {recording.id: recording for recording in recordings}
    worst = sorted(zip(known, languages, strict=True), key=lambda pair: -_rate(*pair))[:WORST]
    if worst := [line for line, spoken in worst if _rate(line, spoken)]:
        parts.append("<h2>The worst transcripts</h2>")
        parts += [_worst(line, sources[line["id"]], transcriber) for line in worst]
    if questions:
        answered = list(answer_questions(transcriber, recordings, lines))
        found = scores(answered)
        result["questions"] = {route: asdict(mean) for route, mean in found.items()}
        parts += ["<h2>Spoken questions</h2>", _routes(found)]
        line_of = {line["id"]: line for line in lines}
        for one in sorted(answered, key=lambda one: one.right("direct") + one.right("cascade"))[:WORST]:
            if not (one.right("direct") and one.right("cascade")):
                parts.append(_wrong(one, line_of[one.id], sources[one.id], transcriber))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Transcripts</title><style>{_STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n",
    )
    return result


def _rate(line: dict[str, Any], language: str) -> float:
    found = errors_in(language, [line["reference"]], [line["text"]])
    return found.rate


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Names in the first column, figures in the others."""
    return table(headings, [[html.escape(cell) for cell in row] for row in rows], right_from=1)


def _statuses(lines: Sequence[dict[str, Any]]) -> str:
    found = [line["status"] for line in lines]
    rows = [(status, f"{found.count(status):,}") for status in ("ok", "no speech", "empty", "error") if status in found]
    problems = [line for line in lines if line["status"] == "error"][:20]
    listed = "".join(f"<li>{html.escape(line['id'])}: {html.escape(line['error'])}</li>" for line in problems)
    return _table(("recordings", "count"), rows) + (f"<ul>{listed}</ul>" if listed else "")


def _errors(name: str, rows: Sequence[Row]) -> str:
    cells = [
        (row.name, f"{row.count:,}", f"{row.rate:.1%}", f"{row.interval[0]:.1%} to {row.interval[1]:.1%}")
        for row in rows
    ]
    return _table((name, "recordings", "error rate", "interval"), cells)


def _silence(transcriber: Transcriber) -> tuple[str, int]:
    """What is said about made silence and noise: through the search for speech, and by the model alone."""
    rows, total = [], 0
    for kind, waveforms in made_silence(transcriber.sample_rate, 3.0, 4).items():
        given = [torch.from_numpy(waveform) for waveform in waveforms]
        found = hallucination([transcript.text for transcript in transcriber(given)])
        alone = hallucination([segment.text for segment in transcriber.segments(given)])
        total += found.words
        rows.append((kind, str(found.count), str(found.words), str(alone.words)))
    return _table(("recording", "count", "words", "words of the model without the search for speech"), rows), total


def _worst(line: dict[str, Any], recording: Recording, transcriber: Transcriber) -> str:
    waveform = transcriber.load(recording.open()[0])
    return (
        f"<h3>{html.escape(line['id'])}</h3>"
        f"<img alt='spectrogram' src='data:image/png;base64,{_picture(waveform, line, transcriber)}'>"
        f"<p>{_difference(line.get('reference', line['text']), line['text'])}</p>"
    )


_ROUTES = {"direct": "directly", "cascade": "the transcript (cascade)", "written": "the true words"}


def _routes(found: Mapping[str, Mean]) -> str:
    rows = [
        (_ROUTES[route], f"{mean.count:,}", f"{mean.score:.1%}", f"± {mean.interval:.1%}")
        for route, mean in found.items()
    ]
    return _table(("answered", "questions", "right", "interval of 95%"), rows)


def _wrong(one: SpokenAnswers, line: dict[str, Any], recording: Recording, transcriber: Transcriber) -> str:
    rows = [("right", " · ".join(dict.fromkeys(one.answers)))]
    rows += [(_ROUTES[route], given or "(nothing)") for route, given in one.given.items()]
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f"{_worst(line, recording, transcriber)}<table>{cells}</table>"


def _picture(waveform: Tensor, line: dict[str, Any], transcriber: Transcriber) -> str:
    features = transcriber.adapter.config.features
    config = FeatureConfig(sample_rate=features.sample_rate, f_max=features.sample_rate / 2, normalize="none")
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    seconds = len(waveform) / features.sample_rate
    extent = (0, seconds, 0, config.n_mels)
    axes.imshow(log_mel(waveform, config).T.numpy(), origin="lower", aspect="auto", extent=extent)
    for segment in line["segments"]:
        for edge in (segment["start"], segment["end"]):
            axes.axvline(edge, color="white", linewidth=1, linestyle="--")
        for word in segment.get("words", ()):
            axes.axvline(word["start"], color="white", linewidth=0.5)
            axes.text(word["start"], config.n_mels, word["text"], fontsize=7, va="bottom", rotation=30)
    axes.set(xlabel="seconds", ylabel="mel bin")
    file = io.BytesIO()
    canvas.print_png(file)
    return base64.b64encode(file.getvalue()).decode()


def _difference(said: str, heard: str) -> str:
    """The reference with what was left out and what was put in marked."""
    one, other = said.split(), heard.split()
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(a=one, b=other, autojunk=False).get_opcodes():
        if kind == "equal":
            parts += map(html.escape, one[a:b])
            continue
        parts += [f"<del>{html.escape(' '.join(one[a:b]))}</del>"] if b > a else []
        parts += [f"<ins>{html.escape(' '.join(other[c:d]))}</ins>"] if d > c else []
    return " ".join(parts)
