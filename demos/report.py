"""`report.html` of the tiny herd: results, loss curves, and held-out samples with the model's answers. One file
without scripts or links to anywhere."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from ..adapters.evaluate import Answer
from ..adapters.model_directory import load
from ..data.dialogs import dialog_sample
from ..data.media import load_audio, load_image, load_video
from ..data.shards import Sample, ShardReader
from ..speech.features import FeatureConfig, log_mel
from ..train.files import write_text
from .tiny_herd import CHAIN, EXAMS

matplotlib.use("Agg")

SAMPLES = 8
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.7rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dae2 } img { max-width: 100% }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .35rem .6rem;
  border-bottom: 1px solid #e4e8ee } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.card { border: 1px solid #d5dae2; border-radius: .5rem; padding: .7rem; overflow: hidden }
.card img { display: block; margin: 0 auto .5rem; image-rendering: pixelated; max-height: 9rem }
.right { color: #12733d } .wrong { color: #b3261e } .quiet { color: #667085 }
"""


Turn = tuple[str, list[dict[str, Any]], str]
"""What the user says, in words; the same as the parts of a message; and the answer."""


def write(out: Path, talk: Sequence[Turn]) -> Path:
    """Writes `out/report.html` from what `herdkit.demos.tiny_herd.run` left in `out` and a `conversation`."""
    results = json.loads((out / "results.json").read_text())
    demo = json.loads((out / "demo.json").read_text())
    parts = [
        "<h1>The tiny herd</h1>",
        f"<p>Seed {demo['seed']}{', quick run: a tenth of the work, the figures mean little' * demo['quick']}. One "
        "frozen language model with sight, motion and hearing grafted onto it; every question below is held out.</p>",
        "<h2>Results</h2>",
        result_table(results["exams"]),
        "<p class=quiet>± is the 95% confidence interval, 1.96 √(S(1-S)/N). Chance guesses evenly among the "
        "possible answers of each question. “Without” is the same question asked without that input.</p>",
        f"<p>{unchanged_sentence(results['text_unchanged'])}</p>",
        "<h2>Conversations</h2>",
        *(turn_lines(*turn) for turn in talk),
        "<h2>Training</h2>",
        f'<img alt="loss curves" src="{loss_curves(out)}">',
    ]
    for exam in EXAMS:
        parts.append(f"<h2>{html.escape(exam.title.capitalize())}</h2>")
        graded = next(entry for entry in results["exams"] if entry["set"] == exam.set)
        if graded.get("kinds"):
            parts.append(kind_table(graded["kinds"]))
        parts.append(sample_cards(out, exam.set))
    body = "\n".join(parts)
    page = out / "report.html"
    write_text(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>The tiny herd</title><style>{STYLE}</style>'
        f"<body>{body}</body></html>\n",
    )
    return page


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def main_figure(exam: dict[str, Any]) -> str:
    if "word_error_rate" in exam:
        return percent(exam["word_error_rate"])
    return f"{percent(exam['accuracy'])} ± {100 * exam['interval']:.1f}"


def aim_of(exam: dict[str, Any]) -> str:
    if exam["aim"] is None:
        return "-"
    sign = "≤" if "word_error_rate" in exam else "≥"
    return f"{sign} {100 * exam['aim']:.0f}% {'✓' if exam['met'] else '✗'}"


def without_of(exam: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {percent(value)}" for kind, value in exam["without"].items()) or "-"


def row_of(exam: dict[str, Any]) -> tuple[str, ...]:
    return (
        exam["title"],
        str(exam["count"]),
        main_figure(exam),
        aim_of(exam),
        percent(exam.get("chance")),
        without_of(exam),
    )


HEADINGS = ("held-out set", "N", "result", "aim", "chance", "without")


def result_table(exams: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row_of(exam)) for exam in exams)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def kind_table(kinds: dict[str, dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(kind)}</td><td class=n>{one['count']}</td><td class=n>{percent(one['accuracy'])}</td>"
        f"<td class=n>{percent(one['chance'])}</td></tr>"
        for kind, one in kinds.items()
    )
    return f"<table><tr><th>kind</th><th class=n>N</th><th class=n>right</th><th class=n>chance</th></tr>{rows}</table>"


def unchanged_sentence(unchanged: dict[str, bool]) -> str:
    if all(unchanged.values()):
        return (
            "The language model never knew: its checkpoint file is byte-identical to the one before any sense was "
            "attached, and its text-only logits are bit-identical with everything attached."
        )
    return f"The language model changed: {unchanged}."


def loss_curves(out: Path) -> str:
    rows = -(-len(CHAIN) // 3)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for number, link in enumerate(CHAIN, 1):
        lines = (out / "stages" / link.name / "metrics.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
        axes = figure.add_subplot(rows, 3, number)
        axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], color="#2456a6", linewidth=1.2)
        axes.set_title(link.title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    return as_source(figure)


def as_source(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_source(picture: Image.Image, scale: int = 2) -> str:
    buffer = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample_cards(out: Path, name: str) -> str:
    """The first samples of a set; where there are mistakes beyond them, the first few of those too."""
    answers = [Answer(**entry) for entry in json.loads((out / "answers" / f"{name}.json").read_text())]
    chosen = answers[:SAMPLES] + [answer for answer in answers[SAMPLES:] if not answer.right][:4]
    samples = ShardReader(str(out / "data" / name / "*.tar"))
    return f"<div class=cards>{''.join(card(samples[answer.index], answer) for answer in chosen)}</div>"


def card(sample: Sample, answer: Answer) -> str:
    media = [part for message in dialog_sample(sample) for part in message.media]
    images = "".join(f'<img alt="{part.type}" src="{medium_source(part.type, part.media)}">' for part in media)
    asked = answer.prompt or ("“" + sample.text("txt") + "”" if "txt" in sample.members else "")
    verdict = "right" if answer.right else "wrong"
    expected = "" if answer.right else f"<br><span class=quiet>expected: {html.escape(answer.expected)}</span>"
    return (
        f"<div class=card>{images}<div>{html.escape(asked)}</div>"
        f"<div class={verdict}><b>{html.escape(answer.given) or '(nothing)'}</b>{expected}</div></div>"
    )


def medium_source(kind: str, data: bytes) -> str:
    if kind == "image":
        return picture_source(load_image(data))
    if kind == "video":
        frames = load_video(data, 6).frames
        height, width = frames.shape[-2:]
        strip = Image.new("RGB", (len(frames) * (width + 2), height), "white")
        for i, frame in enumerate(frames):
            strip.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()), (i * (width + 2), 0))
        return picture_source(strip, 1)
    config = FeatureConfig()
    figure = Figure(figsize=(3.2, 1.1), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(log_mel(load_audio(data, config.sample_rate), config).T, origin="lower", aspect="auto", cmap="magma")
    axes.set_axis_off()
    return as_source(figure)


def conversation(out: Path) -> list[Turn]:
    """Turns on held-out inputs of every sense; each input begins a dialog, for so the model is trained."""
    model = load(out / "model")
    picture, clip, spoken = (
        ShardReader(str(out / "data" / name / "*.tar"))[0]
        for name in ("image_questions_new", "video_questions_new", "spoken_questions_heldout_voice")
    )
    follow_up = "how many objects are there"
    turns: list[tuple[str, list[dict[str, Any]]]] = [
        ("hello", [{"type": "text", "text": "hello"}]),
        (sample_words(picture), sample_parts(picture)),
        (follow_up, [{"type": "text", "text": follow_up}]),
        (sample_words(spoken), sample_parts(spoken)),
        (sample_words(clip), sample_parts(clip)),
    ]
    messages: list[dict[str, Any]] = []
    talk = []
    for words, parts in turns:
        if any(part["type"] != "text" for part in parts):
            messages = []
        messages.append({"role": "user", "content": parts})
        answer = model.chat(messages, max_new_tokens=48)
        messages.append({"role": "assistant", "content": answer})
        talk.append((words, parts, answer))
    return talk


def turn_lines(words: str, parts: Sequence[dict[str, Any]], answer: str) -> str:
    images = "".join(
        f'<img alt="{part["type"]}" style="vertical-align:middle;max-height:6rem" '
        f'src="{medium_source(part["type"], part[part["type"]])}"> '
        for part in parts
        if part["type"] != "text"
    )
    return f"<p><b>user:</b> {images}{html.escape(words)}</p><p><b>Herd:</b> {html.escape(answer)}</p>"


def sample_parts(sample: Sample) -> list[dict[str, Any]]:
    user = dialog_sample(sample)[-2]
    return [{"type": p.type, p.type: p.text if p.type == "text" else p.media} for p in user.parts]


def sample_words(sample: Sample) -> str:
    text = dialog_sample(sample)[-2].text
    return text or f"(spoken) {sample.text('txt')}"


def print_summary(results: dict[str, Any], page: Path, talk: Sequence[Turn]) -> None:
    """The end of `herdkit demo`: the table, a conversation and the paths, on standard error."""
    console = Console(stderr=True)
    table = Table(title="the tiny herd on held-out questions")
    for heading in HEADINGS:
        table.add_column(heading)
    for exam in results["exams"]:
        table.add_row(*row_of(exam))
    console.print(table)
    console.print(unchanged_sentence(results["text_unchanged"]))
    if results["quick"]:
        console.print(
            "This was a quick run: a tenth of the data and steps. The answers above are poor; see the full demo."
        )
    for words, parts, answer in talk:
        media = "".join(f"({part['type']}) " for part in parts if part["type"] != "text")
        console.print(f"  user: {media}{words}\n  Herd: {answer}", highlight=False, markup=False)
    console.print(f"model directory: {results['model']}\nreport: {page}", highlight=False, soft_wrap=True)
