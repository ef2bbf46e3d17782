"""The recipe of a sweep: a pre-training recipe, and what each of its runs changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..held_out import HeldOutConfig
from ..model import TransformerConfig
from ..pretrain import PretrainRecipe


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, not {value!r}")


@dataclass(kw_only=True)
class SizeConfig:
    """One model size; what it does not state is that of the recipe's `model`.

    Args:
        name: of the size, part of a folder's name.
        dim, n_layers, n_heads, n_kv_heads, ffn_dim: see `TransformerConfig`.
        lr_scale: multiplies `optimizer.lr`. The paper's peak rates are 2e-4 to 4e-4 by size.
    """

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr_scale > 0, "lr_scale", "above 0", self.lr_scale)
        _require(self.name.strip(".") != "" and "/" not in self.name, "name", "a folder's name", self.name)

    def model(self, shared: TransformerConfig) -> TransformerConfig:
        """
        Raises:
            ValueError: the sizes do not fit each other.
        """
        changes = {name: getattr(self, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")}
        return dataclasses.replace(shared, **changes)


@dataclass(kw_only=True)
class BudgetConfig:
    """Runs of equal compute.

    Args:
        flops: of the training of each run, forward and backward (`3 * Transformer.flops_per_token`).
        batch_size: rows of one update, the same for all sizes (section 3.2.1).
        sizes: names of the sizes to train; empty: all.
    """

    flops: float
    batch_size: int
    sizes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.flops > 0, "flops", "above 0", self.flops)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)

    @property
    def name(self) -> str:
        return f"{self.flops:.3g}"


@dataclass(kw_only=True)
class ForecastConfig:
    """The downstream forecast. Its questions are made from the held-out documents: in which order do the words that
    follow a prompt stand? All choices have the same words, so that nothing but the order tells them apart; of whole
    other texts, models this small only see which has the more common words.

    Args:
        questions: at most; the documents are cut without overlap, so they give only so many.
        prompt_chars, answer_chars: lengths, up to the next space.
        choices: orders to choose from, the right one included; 1 / choices is chance.
        others: directories of further models, which take part in the step from NLL to accuracy alone.
    """

    questions: int = 400
    prompt_chars: int = 64
    answer_chars: int = 40
    choices: int = 4
    others: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.choices >= 2, "choices", "at least 2", self.choices)
        for name in ("questions", "prompt_chars", "answer_chars"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(kw_only=True)
class MadeData:
    """Made sets (`herdkit.data.synthetic.sets`) to build before the sweep where they are not there yet.

    Args:
        out: folder of the sets.
        sets: their names.
    """

    out: str
    sets: list[str]


@dataclass(kw_only=True)
class ScalingLawRecipe(PretrainRecipe):
    """A pre-training recipe. In each run, `model` has the shape of a size, `optimizer.lr` is scaled by it,
    `trainer.batch_size` is the budget's, and `trainer.steps` spends the budget; the one given here is the most
    that any run may make, so that a mistyped budget is refused before anything is trained.

    Args:
        sizes, budgets: every budget with each of its sizes is a run.
        held_out: documents (`txt`) that no run trains on; their loss, over all sources together, is what is fitted.
        targets: budgets in FLOPs for which to predict the optimum.
        resamples: of the bootstrap.
        workers: runs at a time, each in a process of its own with its share of the cores; 0 makes them one after
            the other in this process, or in all processes that `torchrun` started.
        forecast: None leaves the downstream forecast out.
        made: None where the data are there.
    """

    sizes: list[SizeConfig]
    budgets: list[BudgetConfig]
    targets: list[float] = field(default_factory=list)
    resamples: int = 1000
    workers: int = 0
    forecast: ForecastConfig | None = None
    made: MadeData | None = None

    def __post_init__(self) -> None:
        if self.held_out is None or not self.held_out.sources:
            raise ValueError("held_out: a sweep needs documents to measure its models on")
        if self.phases:
            raise ValueError("phases: the runs of a sweep have one batch size each; leave them out")
        _require(self.workers >= 0, "workers", "at least 0", self.workers)
        _require(self.resamples >= 1, "resamples", "at least 1", self.resamples)
        _require(all(target > 0 for target in self.targets), "targets", "above 0", self.targets)
        _require(len(self.sizes) > 0, "sizes", "a list of sizes", self.sizes)
        _require(len(self.budgets) > 0, "budgets", "a list of budgets", self.budgets)
        _require_distinct("sizes", (size.name for size in self.sizes))
        _require_distinct("budgets", (budget.name for budget in self.budgets))
        known = [size.name for size in self.sizes]
        for i, budget in enumerate(self.budgets):
            if unknown := [name for name in budget.sizes if name not in known]:
                raise ValueError(f"budgets[{i}].sizes: no size is named {unknown[0]!r}; there are {', '.join(known)}")
        for i, size in enumerate(self.sizes):
            try:
                size.model(self.model)
            except ValueError as error:
                raise ValueError(f"sizes[{i}]: {error}") from None

    @property
    def measured_on(self) -> HeldOutConfig:
        """`held_out`, with the rows of training."""
        assert self.held_out is not None
        return dataclasses.replace(self.held_out, row_length=self.held_out.row_length or self.data.row_length)

    def sizes_of(self, budget: BudgetConfig) -> list[SizeConfig]:
        return [size for size in self.sizes if not budget.sizes or size.name in budget.sizes]


def _require_distinct(key: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{key}: {name!r} is there twice")
        seen.add(name)
