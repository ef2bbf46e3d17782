"""Runs a sweep: one ordinary `text.pretrain` run directory for each budget and size, each finished once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...data.shards import ShardReader
from ...data.synthetic.sets import build
from ...train.child import LOG, end_with_parent, log_to
from ...train.config import as_dict
from ...train.files import write_json
from ...train.guard import NonFiniteError
from ...train.parallel import on_first, rank
from ...train.progress import ProgressLine
from ...train.run_directory import RunDirectoryError, differences
from .. import pretrain
from ..held_out import HeldOut, HeldOutConfig
from ..model import Transformer
from ..model_directory import load_text
from ..pretrain import PretrainRecipe, prepare_tokenizer
from ..row_loader import Encode
from ..row_stage import document_encoder
from ..tokenizer import Tokenizer
from .fit import ScalingLawError
from .questions import answer, word_orders
from .recipe import BudgetConfig, ForecastConfig, ScalingLawRecipe, SizeConfig

RECORD = "measured.json"
_COUNTED = 2000
"""Samples of a source at most whose tokens are counted to find out how long a sample is."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of the sweep, planned.

    Args:
        name: "budget-size".
        run_dir: its own.
        budget: C in FLOPs.
        flops_per_token: of training: three times the forward pass of the model, at half a row of context, masks
            between documents not discounted. Every position of a row costs it, padding too.
        epochs: passes over the source that is repeated most.
        recipe: what `text.pretrain` runs.
        held_out, forecast: what the model is measured on.
    """

    name: str
    run_dir: Path
    budget: float
    flops_per_token: int
    epochs: float
    recipe: PretrainRecipe
    held_out: HeldOutConfig
    forecast: ForecastConfig | None


def plan(recipe: ScalingLawRecipe, run_dir: Path) -> list[Point]:
    """All runs, by budget and size. Makes what they share: the made data and the tokenizer.

    Raises:
        ScalingLawError: a run would not get through its warm-up, or make more than `trainer.steps` updates.
    """
    if recipe.made is not None:
        build(recipe.made.out, only=recipe.made.sets, workers=0)
    if not recipe.tokenizer:
        shared = run_dir / "tokenizer.json"
        if not shared.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            prepare_tokenizer(recipe).save(shared)
        recipe = dataclasses.replace(recipe, tokenizer=str(shared))
    readers = [ShardReader(source.shards) for source in recipe.data.sources]
    if not readers:
        raise ScalingLawError("data.sources is empty; name at least one set of shards")
    total = sum(source.weight for source in recipe.data.sources)
    shares = [source.weight / total for source in recipe.data.sources]
    encode = document_encoder(Tokenizer.load(recipe.tokenizer))
    # How often one token of a run passes over its source, of the source that is repeated most.
    passes = max(
        share / (len(reader) * mean_tokens(reader, encode)) for share, reader in zip(shares, readers, strict=True)
    )
    sized = [(budget, size) for budget in recipe.budgets for size in recipe.sizes_of(budget)]
    return [_point(recipe, run_dir, budget, size, passes) for budget, size in sized]


def mean_tokens(reader: ShardReader, encode: Encode) -> float:
    """Tokens of a sample, on average over evenly spread ones."""
    step = -(-len(reader) // _COUNTED)
    counts = [len(tokens) for tokens in encode([reader[i] for i in range(0, len(reader), step)])]
    return sum(counts) / len(counts)


def _point(recipe: ScalingLawRecipe, run_dir: Path, budget: BudgetConfig, size: SizeConfig, passes: float) -> Point:
    name = f"{budget.name}-{size.name}"
    config = size.model(recipe.model)
    with torch.device("meta"):
        flops = 3 * Transformer(config).flops_per_token(recipe.data.row_length / 2)
    positions = budget.batch_size * recipe.data.row_length
    steps = round(budget.flops / (flops * positions))
    if steps <= 2 * recipe.schedule.warmup_steps:
        raise ScalingLawError(
            f"run {name}: {budget.flops:.3g} FLOPs make {steps} updates of this size, of which "
            f"{recipe.schedule.warmup_steps} warm up; leave it out of budgets.sizes, or take a smaller batch_size"
        )
    if steps > recipe.trainer.steps:
        raise ScalingLawError(
            f"run {name}: {budget.flops:.3g} FLOPs make {steps} updates, and trainer.steps allows "
            f"{recipe.trainer.steps}; leave it out of budgets.sizes, or take a larger batch_size"
        )
    shared = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(PretrainRecipe)}
    own = shared | {
        "stage": "text.pretrain",
        "model": config,
        "optimizer": dataclasses.replace(recipe.optimizer, lr=recipe.optimizer.lr * size.lr_scale),
        "trainer": dataclasses.replace(recipe.trainer, steps=steps, batch_size=budget.batch_size),
        "held_out": None,  # measured at the end, with more than the loss
    }
    return Point(
        name=name,
        run_dir=run_dir / "runs" / name,
        budget=budget.flops,
        flops_per_token=flops,
        epochs=steps * positions * passes,
        recipe=PretrainRecipe(**own),
        held_out=recipe.measured_on,
        # The other models are measured apart: one more is no reason to measure this one again.
        forecast=recipe.forecast and dataclasses.replace(recipe.forecast, others=[]),
    )


def run_point(point: Point) -> dict[str, Any]:
    """Trains and measures a point, or goes on with it; of one that is finished it reads the record.

    Returns:
        The content of `measured.json`: "name", "budget", "parameters", "steps", "epochs", "tokens", "flops" (spent),
        "loss" (held-out, per token), "nll_per_character", "nll_per_byte", "answers" (of the forecast, or null),
        "wall_seconds", and the "recipe". A diverged run has "diverged", the reason, in place of what was measured, and
        no file, so that the next start tries it again.

    Raises:
        RunDirectoryError: the directory holds a run of another recipe.
    """
    trained = on_first(lambda: read_record(point))
    if trained is None:
        try:
            trained = pretrain.run(point.recipe, point.run_dir)
        except NonFiniteError as error:
            return _head(point) | {"diverged": str(error)}
    elif trained["measured_on"] == _head(point)["measured_on"]:
        return trained
    return on_first(lambda: measure_point(point, trained))


def read_record(point: Point) -> dict[str, Any] | None:
    """The record of a finished run, whatever it was measured on; None where there is none.

    Raises:
        RunDirectoryError: it was made by another recipe.
    """
    path = point.run_dir / RECORD
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    mine = _head(point)
    changes = differences(record["recipe"], mine["recipe"])
    if changes or record["steps"] != mine["steps"]:
        changes = changes or [f"trainer.steps: {record['steps']} -> {mine['steps']}"]
        raise RunDirectoryError(
            f"{point.run_dir} holds a run of another recipe: {'; '.join(changes[:6])}. Choose another run directory, "
            "undo the change, or delete it to train it anew"
        )
    return record


def _head(point: Point) -> dict[str, Any]:
    """What a record says of the plan."""
    return {
        "name": point.name,
        "budget": point.budget,
        "steps": point.recipe.trainer.steps,
        "epochs": point.epochs,
        "recipe": as_dict(point.recipe),
        "measured_on": {"held_out": as_dict(point.held_out), "forecast": point.forecast and as_dict(point.forecast)},
    }


def measure_point(point: Point, trained: dict[str, Any]) -> dict[str, Any]:
    """Measures the finished model on the held-out documents and writes the record.

    Args:
        trained: the trainer's result, or an earlier record.
    """
    model, tokenizer = load_text(point.run_dir / "model")
    documents = read_documents(point.held_out)
    loss, tokens = measure(model, tokenizer, point.held_out)
    answers = None
    if point.forecast is not None:
        answers = dataclasses.asdict(answer(model, tokenizer, word_orders(documents, point.forecast)))
    record = _head(point) | {
        "parameters": trained["parameters"],
        "samples": trained["samples"],
        "tokens": trained["tokens"],
        "flops": trained["samples"] * point.recipe.data.row_length * point.flops_per_token,
        "loss": loss / tokens,
        "nll_per_character": loss / sum(map(len, documents)),
        "nll_per_byte": loss / sum(len(text.encode()) for text in documents),
        "answers": answers,
        "wall_seconds": trained["wall_seconds"],
    }
    write_json(point.run_dir / RECORD, record)
    return record


def measure(model: Transformer, tokenizer: Tokenizer, config: HeldOutConfig) -> tuple[float, float]:
    """The summed loss of all held-out documents, in nats, and their number of targets."""
    assert config.row_length is not None
    held_out = HeldOut(config, document_encoder(tokenizer), tokenizer.pad_id, config.row_length)
    loss, tokens = torch.cat(list(held_out.document_losses(model).values())).sum(0).tolist()
    return loss, tokens


def read_documents(config: HeldOutConfig) -> list[str]:
    """The texts of the samples that are measured."""
    readers = [ShardReader(source.shards) for source in config.sources]
    return [reader[i].text("txt") for reader in readers for i in range(min(config.samples, len(reader)))]


def run_points(points: Sequence[Point], workers: int) -> list[dict[str, Any]]:
    """The records of all points, in their order. Those that are not finished run in `workers` processes, or in this
    one with 0.

    Raises:
        ScalingLawError: a run failed; names it.
    """
    records: dict[str, dict[str, Any]] = {}
    with ProgressLine("scaling laws: runs", len(points), silent=rank() > 0) as progress:
        if workers:
            progress.say(f"{len(points)} runs, {workers} at a time; each tells of itself in {LOG} of its folder")
        for record in _each(points, workers):
            records[record["name"]] = record
            progress.update(len(records), record["name"])
    return [records[point.name] for point in points]


def _each(points: Sequence[Point], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 0:
        for point in points:
            yield _named(point, partial(run_point, point))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ScalingLawError("workers is for a single process: with torchrun set workers=0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the OpenMP of torch reads it as a worker starts
    threads = max(1, torch.get_num_threads() // workers)
    with ExitStack() as stack:
        # Fresh processes: a fork would take the parent's threads' locks with it.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(threads,))
        stack.callback(pool.shutdown, cancel_futures=True)
        jobs = {pool.submit(_run_logged, point): point for point in points}
        for job in as_completed(jobs):
            yield _named(jobs[job], job.result)


def _named(point: Point, result: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return result()
    except RunDirectoryError:
        raise  # it names the directory
    except Exception as error:
        raise ScalingLawError(f"run {point.name} in {point.run_dir} failed: {error}") from error


def _start_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _run_logged(point: Point) -> dict[str, Any]:
    """`run_point` with what it says in the log of the run."""
    point.run_dir.mkdir(parents=True, exist_ok=True)
    log_to(point.run_dir)
    return run_point(point)
