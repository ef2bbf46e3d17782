"""Annealing (section 3.4.3): the learning rate falls linearly to zero while good data are sampled more often, and the
model that results is the mean of checkpoints taken on the way. And annealing as a probe of a new data set (3.1.3)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.sources import SourceConfig, source_names
from ..train.averaging import average_checkpoints
from ..train.files import write_json
from ..train.parallel import on_first
from ..train.recipe import Stage
from .held_out import HeldOut
from .model_directory import load_text, open_text, save_text
from .plan import plan_continued
from .row_stage import RowRecipe, document_encoder, train_on_rows


@dataclass(kw_only=True)
class AnnealRecipe(RowRecipe):
    """
    Args:
        init: model directory to start from.
        average: the result is the mean of this many of the run's newest checkpoints, of which the trainer must `keep`
            as many; 1 takes the last weights. The paper does not say how many.
    """

    init: str
    average: int = 1

    def __post_init__(self) -> None:
        if self.average < 1:
            raise ValueError(f"average must be at least 1, not {self.average}")
        taken = math.ceil(self.trainer.steps / self.trainer.checkpoint_every)
        if self.average > min(taken, self.trainer.keep):
            raise ValueError(
                f"average is {self.average}, but the run takes {taken} checkpoints and keeps {self.trainer.keep}: "
                "change trainer.checkpoint_every or trainer.keep"
            )


def run(recipe: AnnealRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains and writes `run_dir/model`, the mean; returns the trainer's result. Where several checkpoints were
    averaged it also has "averaged_steps" and, where something is held out, "averaged_evaluation" beside "evaluation",
    which is that of the last weights."""
    weights, tokenizer = open_text(recipe.init)
    part, result = train_on_rows(recipe, weights, tokenizer, run_dir)
    if recipe.average > 1:
        result["averaged_steps"] = average_checkpoints(part.model, run_dir, recipe.average)
    save_text(part.weights(), tokenizer, run_dir / "model")
    if recipe.average > 1 and recipe.held_out is not None:
        held_out = HeldOut(recipe.held_out, document_encoder(tokenizer), tokenizer.pad_id, recipe.data.row_length)
        result["averaged_evaluation"] = held_out(part, recipe.trainer.steps)
    return result


def probe(recipe: AnnealRecipe, new: SourceConfig, run_dir: Path, share: float = 0.3) -> dict[str, Any]:
    """What a new data set is worth: the same model annealed on the recipe's mixture, and on `share` of the new data
    and the mixture for the rest, both measured on what the recipe holds out. Section 3.1.3 anneals an 8B model at half
    of its training over 40B tokens with a share of 0.3.

    Both runs lie in `run_dir` and are resumed there; `run_dir/probe.json` holds what is returned.

    Args:
        new: the new data; its weight has no meaning.
        share: of the documents.

    Returns: by held-out source "gain", the mean loss per token without the new data less that with it, in nats, and
        "interval", half of its 95% confidence interval: over documents, which are paired. How much the gain would
        change with another seed of training it does not say.

    Raises:
        ValueError: nothing is held out, `share` is not between 0 and 1, or the recipe has phases, which would set
            other weights.
    """
    if recipe.held_out is None:
        raise ValueError("held_out: a probe needs documents to measure the gain on")
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, not {share}")
    if recipe.phases:
        raise ValueError("phases: a probe has one mixture; leave them out")
    total = sum(source.weight for source in recipe.data.sources)
    names = source_names(recipe.data.sources)
    mixed = [
        dataclasses.replace(source, name=name, weight=source.weight / total * (1 - share))
        for name, source in zip(names, recipe.data.sources, strict=True)
    ]
    mixed.append(dataclasses.replace(new, weight=share, name=new.name or source_names([new])[0]))
    runs = {
        "without": recipe,
        "with": dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=mixed)),
    }
    losses = {}
    for name, variant in runs.items():
        run(variant, run_dir / name)
        model, tokenizer = load_text(run_dir / name / "model")
        held_out = HeldOut(recipe.held_out, document_encoder(tokenizer), tokenizer.pad_id, recipe.data.row_length)
        losses[name] = held_out.document_losses(model)
    gains = {}
    for source, before in losses["without"].items():
        count = before[:, 1]
        difference = before[:, 0] - losses["with"][source][:, 0]
        gain = difference.sum() / count.sum()
        # A ratio of sums: its error is that of the residuals, which are independent from document to document.
        residual = difference - gain * count
        error = residual.square().sum().sqrt() / count.sum()
        gains[source] = {
            "without": (before[:, 0].sum() / count.sum()).item(),
            "gain": gain.item(),
            "interval": 1.96 * error.item(),
            "documents": len(count),
        }
    result = {"share": share, "gains": gains}
    on_first(lambda: write_json(run_dir / "probe.json", result))
    return result


STAGE = Stage(AnnealRecipe, run, plan_continued)
