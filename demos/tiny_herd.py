"""The tiny herd: makes data, trains a language model, grafts sight, motion and hearing onto it, and asks it.

Every link is a stage of the paper in miniature, run by the same code and recipes as the large sizes. Killed at any
point and started again, it goes on from the last finished point.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..adapters.evaluate import Answer, Score, answers, score, score_by_kind
from ..adapters.model_directory import load
from ..data.shards import ShardReader
from ..data.synthetic.sets import SetSizes, build
from ..speech.evaluate import word_errors
from ..train.config import load_recipe
from ..train.files import write_json
from ..train.recipe import StageRecipe
from .chain import Chain, Link, digest

CHAIN = (
    Link(
        name="text-pretrain",
        title="language model: pre-training",
        recipe="text/recipes/tiny_pretrain.yaml",
        alone=True,
    ),
    Link(name="text-sft", title="language model: dialogues", recipe="text/recipes/tiny_sft.yaml", alone=True),
    Link(name="vision-contrastive", title="vision encoder: contrast", recipe="vision/recipes/tiny_contrastive.yaml"),
    Link(name="image-pretrain", title="image adapter: captions", recipe="vision/recipes/tiny_image_pretrain.yaml"),
    Link(name="image-sft", title="image adapter: questions", recipe="vision/recipes/tiny_image_sft.yaml"),
    Link(name="speech-bestrq", title="speech encoder: BEST-RQ", recipe="speech/recipes/tiny_bestrq.yaml"),
    Link(
        name="speech-transcription",
        title="speech adapter: transcription",
        recipe="speech/recipes/tiny_transcription.yaml",
    ),
    Link(name="speech-dialog", title="speech adapter: questions", recipe="speech/recipes/tiny_dialog.yaml"),
    Link(
        name="video-pretrain",
        title="video adapter: captions",
        recipe="vision/recipes/tiny_video_pretrain.yaml",
        alone=True,
    ),
    Link(
        name="video-sft",
        title="video adapter: questions",
        recipe="vision/recipes/tiny_video_sft.yaml",
        alone=True,
    ),
    Link(
        name="together",
        title="all senses: spoken questions about pictures",
        recipe="speech/recipes/tiny_together.yaml",
        alone=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A held-out set: what is asked, the part types without which it is asked again, and the aim of the full demo
    (accuracy, or word error rate for transcripts)."""

    set: str
    title: str
    without: tuple[tuple[str, ...], ...]
    aim: float | None = None
    transcripts: bool = False


EXAMS = (
    Exam(set="text_dialogs_new", title="text questions", without=()),
    Exam(set="image_questions_new", title="picture questions, new scenes", without=(("image",),), aim=0.90),
    Exam(
        set="image_questions_combinations",
        title="picture questions, new combinations",
        without=(("image",),),
        aim=0.75,
    ),
    Exam(set="video_questions_new", title="video questions, new clips", without=(("video",),), aim=0.85),
    Exam(
        set="speech_transcripts_heldout_voice",
        title="transcription, new voice (word errors)",
        without=(("audio",),),
        aim=0.15,
        transcripts=True,
    ),
    Exam(set="spoken_questions_heldout_voice", title="spoken questions, new voice", without=(("audio",),), aim=0.80),
    Exam(
        set="two_senses_heldout",
        title="spoken questions about pictures, new voice",
        without=(("image",), ("audio",)),
        aim=0.75,
    ),
)

QUICK_SIZES = SetSizes(
    english_bytes=300_000,
    recitations=1_000,
    dialogues=3_000,
    pairs=1_000,
    captions=200,
    scenes=900,
    clips=250,
    transcripts=600,
    spoken_questions=300,
    two_senses=300,
    held_out=60,
)
QUICK_STEPS = 0.1


def run(out: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Runs what is not finished of the whole demo and returns its results.

    Args:
        out: folder of data, stages, model, answers and report.
        seed: of data, weights and order.
        quick: a tenth of the data and steps: every link runs, the accuracies mean little.

    Raises:
        ValueError: `out` holds a demo of another seed or size.
    """
    console = console or Console(stderr=True)
    out = out.resolve()
    started = time.monotonic()
    claim(out, seed, quick)
    seconds: dict[str, float] = {}
    with timed(seconds, "data"):
        make_data(out, seed, quick, console)

    def recipe(link: Link) -> StageRecipe:
        return tiny_recipe(link, out, seed, quick)

    chain = Chain(CHAIN, out / "stages", recipe, console, before_training=lambda: discard_end(out))
    chain.train()
    seconds |= chain.seconds
    with timed(seconds, "evaluation"):
        publish(out)
        results = examine(out, console)
    write_json(out / "results.json", results)
    return {
        "out": str(out),
        "model": str(out / "model"),
        "seed": seed,
        "quick": quick,
        "seconds": round(time.monotonic() - started, 1),
        "stage_seconds": {name: round(value, 1) for name, value in seconds.items()},
        **results,
    }


def claim(out: Path, seed: int, quick: bool) -> None:
    """Says in `out/demo.json` what runs there, so that no other demo goes on in the same place."""
    mine = {"seed": seed, "quick": quick}
    file = out / "demo.json"
    if file.exists() and (found := json.loads(file.read_text())) != mine:
        raise ValueError(f"{out} holds a demo with {found}, now {mine} is asked for; give another --out or delete it")
    if not file.exists() and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and no demo of ours; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, mine)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


@contextmanager
def bar(console: Console, title: str, total: int | None = None) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        progress.add_task(title, total=total)
        yield progress


def make_data(out: Path, seed: int, quick: bool, console: Console) -> None:
    sizes = QUICK_SIZES if quick else SetSizes()
    with bar(console, "data") as progress:
        (task,) = progress.task_ids

        def report(sets: str, done: int, total: int) -> None:
            progress.update(task, description=f"data: {sets.split(' ')[0]}", completed=done, total=total)

        build(out / "data", sizes, seed=seed, progress=report)


def tiny_recipe(link: Link, out: Path, seed: int, quick: bool) -> StageRecipe:
    recipe = load_recipe(link.path, link.stage.recipe, [f"root={out}", f"trainer.seed={seed}", f"data.seed={seed}"])
    if quick:
        recipe.trainer.steps = max(10, round(recipe.trainer.steps * QUICK_STEPS))
        recipe.schedule.warmup_steps = round(recipe.schedule.warmup_steps * QUICK_STEPS)
        if recipe.schedule.decay_steps is not None:
            recipe.schedule.decay_steps = max(1, round(recipe.schedule.decay_steps * QUICK_STEPS))
    return recipe


def discard_end(out: Path) -> None:
    """Deletes what an earlier end of the chain left."""
    for stale in (out / "model", out / "answers"):
        if stale.exists():
            shutil.rmtree(stale)


def publish(out: Path) -> None:
    """Copies the last stage's model to `out/model`."""
    source, target = out / "stages" / CHAIN[-1].name / "model", out / "model"
    if target.exists():
        return
    draft = out / ".model.part"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    draft.rename(target)


def examine(out: Path, console: Console) -> dict[str, Any]:
    """Asks the model every held-out question, with and without the inputs; answers are kept in `out/answers`."""
    model = load(out / "model")
    exams = []
    for exam in EXAMS:
        samples = ShardReader(str(out / "data" / exam.set / "*.tar"))
        asked: list[tuple[str, ...]] = [(), *exam.without]
        with bar(console, f"asking: {exam.title}", len(samples) * len(asked)) as progress:
            found = [kept_answers(out / "answers", exam, without, model, samples, progress) for without in asked]
        exams.append(grade(exam, dict(zip(asked, found, strict=True))))
    return {"exams": exams, "text_unchanged": text_unchanged(out)}


def kept_answers(
    folder: Path, exam: Exam, without: Collection[str], model: Any, samples: ShardReader, progress: Progress
) -> list[Answer]:
    file = folder / f"{exam.set}{''.join(f'-without-{kind}' for kind in without)}.json"
    (task,) = progress.task_ids
    if file.exists():
        found = [Answer(**entry) for entry in json.loads(file.read_text())]
        progress.advance(task, len(found))
        return found
    found = list(answers(model, samples, without=without, progress=lambda n: progress.advance(task, n)))
    folder.mkdir(exist_ok=True)
    write_json(file, [asdict(answer) for answer in found])
    return found


def grade(exam: Exam, found: Mapping[tuple[str, ...], Sequence[Answer]]) -> dict[str, Any]:
    """The row of the result table."""
    graded: dict[str, Any] = {"set": exam.set, "title": exam.title, "aim": exam.aim, "count": len(found[()])}
    if exam.transcripts:
        errors = {
            without: word_errors([a.expected for a in given], [a.given for a in given])
            for without, given in found.items()
        }
        graded["word_error_rate"] = errors[()].rate
        graded["met"] = exam.aim is None or errors[()].rate <= exam.aim
        graded["without"] = {"+".join(k): e.rate for k, e in errors.items() if k}
        return graded
    scores = {without: score(given) for without, given in found.items()}
    graded |= describe_score(scores[()])
    graded["met"] = exam.aim is None or scores[()].accuracy >= exam.aim
    graded["without"] = {"+".join(k): s.accuracy for k, s in scores.items() if k}
    graded["kinds"] = {kind: describe_score(s) for kind, s in score_by_kind(found[()]).items()}
    return graded


def describe_score(one: Score) -> dict[str, Any]:
    return {"accuracy": one.accuracy, "interval": one.interval, "chance": one.chance, "count": one.count}


def text_unchanged(out: Path) -> dict[str, bool]:
    """Whether the language model is what it was before any sense was grafted onto it: the bytes of its checkpoint,
    and the bits of its logits with everything attached."""
    before, after = out / "stages" / "text-sft" / "model", out / "model"
    digests = {digest(path / "text.safetensors") for path in (before, after)}
    tokens = torch.arange(512).view(4, 128) % load(before).text.config.vocab_size
    with torch.inference_mode():
        same = torch.equal(load(before)(tokens), load(after)(tokens))
    return {"checkpoint_bytes": len(digests) == 1, "logits_bits": same}
