"""Long-context pre-training (section 3.4.2): rows grow in steps, and the model goes on to the next length once it has
adapted to this one: what it does on short rows has recovered, and it finds a needle anywhere up to this length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..train.files import copy_tree, write_json
from ..train.parallel import device, on_first
from ..train.recipe import Stage
from .held_out import HeldOut, HeldOutConfig
from .interchange.directory_weights import StoredWeights
from .model import RopeScaling, Transformer
from .model_directory import open_text, save_text, writing
from .needle import NeedleConfig, NeedleTest, plot
from .plan import plan_lengths
from .row_stage import RowRecipe, document_encoder, train_on_rows
from .tokenizer import Tokenizer


@dataclass(kw_only=True)
class Length:
    """
    Args:
        row_length: of the rows of this stage.
        steps: updates of one round.
        batch_size: rows of an update. accumulate: micro-batches of it on each process.
    """

    row_length: int
    steps: int
    batch_size: int
    accumulate: int = 1


@dataclass(kw_only=True)
class Promotion:
    """When a model may go on to the next length. The paper asks for short-context evaluations "fully recovered" and
    needles found "perfectly"; how much training may be added until then is ours.

    Args:
        tolerance: how much higher the loss on held-out short rows may be than before the first stage, in nats a token.
        found: share of needles that must be found at every length and depth.
        rounds: how often a stage is trained at most, the first time included.
    """

    tolerance: float = 0.01
    found: float = 1.0
    rounds: int = 3


@dataclass(kw_only=True)
class LongContextRecipe(RowRecipe):
    """`held_out` is required: its loss, at `data.row_length`, is what must recover. `trainer.steps`, `batch_size` and
    `accumulate` are those of each length.

    Args:
        init: model directory to start from.
        rope_scaling: of the model from now on, as in the released 3.1 models; None leaves it. The paper has none.
        lengths: the stages, in ascending order.
        promotion: when to go on.
        needle: the test for it.
    """

    init: str
    rope_scaling: RopeScaling | None = None
    lengths: list[Length]
    promotion: Promotion = field(default_factory=Promotion)
    needle: NeedleConfig

    def __post_init__(self) -> None:
        lengths = [stage.row_length for stage in self.lengths]
        if not lengths or lengths != sorted(set(lengths)):
            raise ValueError(f"lengths must be in ascending order of row_length, not {lengths}")
        if self.held_out is None:
            raise ValueError("held_out: promotion needs short documents to measure on")
        if self.phases:
            raise ValueError("phases: the lengths of a long-context run are its phases; leave them out")


class NotPromotedError(RuntimeError):
    """A model did not adapt to a length in the rounds that it had."""


def run(recipe: LongContextRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains length by length and writes `run_dir/model`.

    Every round of a stage is a run of its own, in `run_dir/length-<row length>/round-<n>`, with the model that results
    in `model`, a `check.json` and the heat map of the needles, `needle.png`, beside it. All of it is resumed. For its
    checks the first process has the whole model.

    Returns: the result of the last round, with "checks": of every round, what was measured and whether it was promoted.

    Raises:
        NotPromotedError: a stage has had all its rounds; the model of the last one stays in its run directory.
    """
    weights, tokenizer = open_text(recipe.init)
    config = dataclasses.replace(
        weights.config,
        max_seq_len=max(weights.config.max_seq_len, recipe.lengths[-1].row_length),
        rope_scaling=recipe.rope_scaling or weights.config.rope_scaling,
    )
    weights = dataclasses.replace(weights, config=config)
    check = _Check(recipe, tokenizer)
    before = check.short_losses(weights, run_dir / "before.json")
    checks: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    here = run_dir
    for stage in recipe.lengths:
        for number in range(recipe.promotion.rounds):
            here = run_dir / f"length-{stage.row_length}" / f"round-{number}"
            part, result = train_on_rows(_round(recipe, stage, len(checks)), weights, tokenizer, here)
            weights, _ = open_text(save_text(part.weights(), tokenizer, here / "model"))
            del part  # the next round makes another
            checks.append(check(weights, stage.row_length, before, here))
            if checks[-1]["promoted"]:
                break
        else:
            raise NotPromotedError(
                f"{run_dir}: after {recipe.promotion.rounds} rounds at {stage.row_length} tokens the model is not "
                f"ready for more: {checks[-1]['reason']}. Give it more steps, or change 'promotion'"
            )
    on_first(lambda: _copy(here / "model", run_dir / "model"))
    return {**result, "checks": checks}


def _round(recipe: LongContextRecipe, stage: Length, number: int) -> LongContextRecipe:
    """The recipe of one round: rows of the stage, documents in an order of its own."""
    data = dataclasses.replace(recipe.data, row_length=stage.row_length, seed=recipe.data.seed + number)
    trainer = dataclasses.replace(
        recipe.trainer, steps=stage.steps, batch_size=stage.batch_size, accumulate=stage.accumulate
    )
    return dataclasses.replace(recipe, data=data, trainer=trainer, held_out=_at_length(recipe))


def _at_length(recipe: LongContextRecipe) -> HeldOutConfig:
    """What is held out, in short rows whatever the length of the stage."""
    assert recipe.held_out is not None
    return dataclasses.replace(recipe.held_out, row_length=recipe.held_out.row_length or recipe.data.row_length)


def _copy(model: Path, to: Path) -> None:
    with writing(to) as fresh:
        copy_tree(model, fresh)


class _Check:
    """Measures a model for promotion; what was measured once is read from its file. The first process loads the model
    when it measures, and drops it: a part of one cannot decode."""

    def __init__(self, recipe: LongContextRecipe, tokenizer: Tokenizer):
        assert recipe.held_out is not None
        self.promotion = recipe.promotion
        self.shortest = recipe.data.row_length
        self.held_out = HeldOut(recipe.held_out, document_encoder(tokenizer), tokenizer.pad_id, self.shortest)
        self.needle = NeedleTest(recipe.needle, tokenizer)
        self.lengths = [self.shortest, *(stage.row_length for stage in recipe.lengths)]

    def short_losses(self, weights: StoredWeights, file: Path) -> dict[str, float]:
        return _once(file, lambda: self.held_out(_loaded(weights), 0))

    def __call__(self, weights: StoredWeights, length: int, before: dict[str, float], run_dir: Path) -> dict[str, Any]:
        return _once(run_dir / "check.json", lambda: self._measure(_loaded(weights), length, before, run_dir))

    def _measure(self, model: Transformer, length: int, before: dict[str, float], run_dir: Path) -> dict[str, Any]:
        short = self.held_out(model, 0)
        lengths = [other for other in self.lengths if other <= length]
        needles = self.needle(model, lengths)
        plot(needles, run_dir / "needle.png", f"needles found after training on {length:,} tokens")
        reasons = [
            f"{name} is {loss:.4f} on short rows, {before[name]:.4f} before"
            for name, loss in short.items()
            if loss > before[name] + self.promotion.tolerance
        ]
        if needles.worst < self.promotion.found:
            reasons.append(f"of the needles at some length and depth {needles.worst:.0%} are found")
        return {
            "row_length": length,
            "short": short,
            "needle": dataclasses.asdict(needles),
            "promoted": not reasons,
            "reason": "; ".join(reasons),
        }


def _loaded(weights: StoredWeights) -> Transformer:
    return weights.load(torch.float32).to(device()).eval()


def _once(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the first process measured, now or before a restart."""

    def read_or_measure() -> dict[str, Any]:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, measure())
        return json.loads(file.read_text())

    return on_first(read_or_measure)


STAGE = Stage(LongContextRecipe, run, plan_lengths)
