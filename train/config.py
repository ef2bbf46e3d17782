"""Recipes: YAML files read into dataclasses, and the dataclasses that every training stage shares.

A stage defines one keyword-only dataclass whose fields are these and its own, and reads it with
`load_recipe`. A key that the dataclass does not have, a value of another type or a missing value is a
`RecipeError` of one line that names the file, the key and the nearest key that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Recipe = TypeVar("Recipe")


class RecipeError(ValueError):
    """A mistake in a recipe file or in an override; one line."""


def _require(condition: bool, field_name: str, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{field_name} must be {rule}, not {value!r}")


@dataclass(kw_only=True)
class GroupRule:
    """Optimisation of the parameters whose names match a glob; `*` also crosses dots.

    Args:
        pattern: glob over full parameter names, such as "image.encoder.*".
        lr_scale: multiplies the learning rate of the schedule.
        weight_decay: replaces the default; None keeps it (see `OptimizerConfig.weight_decay`).
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _require(self.lr_scale >= 0, "lr_scale", "at least 0", self.lr_scale)
        _require((self.weight_decay or 0) >= 0, "weight_decay", "at least 0", self.weight_decay)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (section 3.4.1 of the paper: "The Llama 3 Herd of Models", arXiv 2407.21783).

    Args:
        lr: peak learning rate; the schedule multiplies it.
        betas, eps: of AdamW. The paper gives neither; those of its predecessors are the default.
        weight_decay: for parameters of two or more dimensions. Norms, gates and biases (fewer than two) are
            not decayed, unless a rule in `groups` that matches them states a `weight_decay`.
        clip_norm: the global gradient norm is clipped to this; None leaves it.
        groups: rules in order; the last that matches a parameter's name wins.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    groups: list[GroupRule] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", "in [0, 1)", self.betas)
        _require(self.eps > 0, "eps", "above 0", self.eps)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "above 0", self.clip_norm)


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over a run; `schedule.fraction` has the formulae.

    Args:
        kind: "cosine" and "linear" decay over `decay_steps` updates after the warm-up and then stay at the
            final value; "constant" does not decay; "wsd" (warm-up, stable, decay) is constant up to the last
            `decay_steps` updates of the run, over which it decays linearly.
        warmup_steps: updates of linear warm-up; the first is at 1 / warmup_steps of the peak, not at zero.
        final_fraction: the final learning rate as a fraction of the peak.
        decay_steps: see `kind`. None: the rest of the run (cosine, linear); "wsd" needs a number.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.01
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "warmup_steps", "at least 0", self.warmup_steps)
        _require(0 <= self.final_fraction <= 1, "final_fraction", "in [0, 1]", self.final_fraction)
        _require(self.decay_steps is None or self.decay_steps > 0, "decay_steps", "above 0", self.decay_steps)
        if self.kind == "wsd" and self.decay_steps is None:
            raise ValueError("decay_steps must be given for kind 'wsd'")


@dataclass(kw_only=True)
class FreezeRule:
    """Freezes or trains the parameters whose names match a glob; the last match wins. `*` also crosses dots.

    Args:
        pattern: glob over full parameter names; one that matches nothing is an error.
        trainable: whether they are trained.
        from_step: the rule holds from this update on (0 is the first).
    """

    pattern: str
    trainable: bool
    from_step: int = 0

    def __post_init__(self) -> None:
        _require(self.from_step >= 0, "from_step", "at least 0", self.from_step)


@dataclass(kw_only=True)
class BatchChange:
    """Another batch size from an update on.

    Args:
        from_step: the first update with it.
        batch_size, accumulate: as in `TrainerConfig`.
    """

    from_step: int
    batch_size: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("from_step", "batch_size", "accumulate"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(kw_only=True)
class SpikePolicy:
    """What becomes of an update whose loss or gradient norm stands out from those of the last updates.

    Either stands out above median + threshold x scale, where the scale is the median distance from the median, times
    1.4826 (which makes it the standard deviation of a normal distribution), but at least 1% of the median.

    Args:
        action: "ignore" looks at nothing; "skip" leaves the update out and counts it; "stop" ends the run before it,
            with an error that leaves the last good checkpoint.
        threshold: see above.
        window: the newest updates made that the medians are of.
        least: no update is judged before so many are in the window.
        patience: after so many skipped in a row the level itself has changed, and the run stops.
    """

    action: Literal["ignore", "skip", "stop"] = "ignore"
    threshold: float = 10.0
    window: int = 128
    least: int = 32
    patience: int = 10

    def __post_init__(self) -> None:
        _require(self.threshold > 0, "threshold", "above 0", self.threshold)
        _require(1 <= self.least <= self.window, "least", "from 1 to window", self.least)
        _require(self.patience >= 1, "patience", "at least 1", self.patience)


@dataclass(kw_only=True)
class TrainerConfig:
    """How long and in which pieces a stage trains.

    Args:
        steps: optimizer updates of the whole run.
        batch_size: samples of one update, over all processes and micro-batches, so that the same recipe
            gives the same updates on any layout. Build the loader with `micro_batch_size(world_size)`.
        accumulate: micro-batches of one update on each process.
        ramp: changes of the two, in the order of their updates. The loader must give what `batch_at` says.
        precision: of the forward pass; "bfloat16" is autocast, with float32 parameters and gradients. "auto" is that
            where the device has units for it, else float32; where it would be the other, a run is not resumed.
        seed: of dropout and of anything else random while training.
        checkpoint_every: updates between checkpoints; there is always one at the end.
        keep: how many of the newest checkpoints stay on disk.
        keep_every: checkpoints of updates that are a multiple of it stay as well; None: no further ones.
        background_checkpoints: checkpoints are copied in the memory of the host and written while training goes on.
        log_every: updates between lines of metrics.jsonl.
        evaluate_every: updates between calls of the evaluation hook; None: at the end alone.
        non_finite: at a loss or gradient that is not finite, "stop" with an error that leaves the last good
            checkpoint, or "skip" the update and count it.
        trackers: get what is logged too: "tensorboard", "wandb" (Weights & Biases), see `Trackers`.
        profile_at: traces three updates once this many are finished, see `Profiling`.
        spikes: the same for finite ones that stand out.
        stall_seconds: without the end of an update for so long, every process writes its stacks into `stalls/` of the
            run directory (see `Watchdog`); None: nobody looks.
        stall_action: "report", or "exit" with code 75 afterwards, so that torchrun starts all processes again.
        straggler_factor: a process that takes so many times the median for its own work in an update is reported.
        check_replicas_every: updates between comparisons of all processes' weights and moments, bit for bit, which
            are then also made before every checkpoint; None: never.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    ramp: list[BatchChange] = field(default_factory=list)
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    seed: int = 0
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    background_checkpoints: bool = False
    log_every: int = 10
    evaluate_every: int | None = None
    non_finite: Literal["stop", "skip"] = "stop"
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    profile_at: int | None = None
    spikes: SpikePolicy = field(default_factory=SpikePolicy)
    stall_seconds: float | None = 600.0
    stall_action: Literal["report", "exit"] = "report"
    straggler_factor: float = 1.5
    check_replicas_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("evaluate_every", "keep_every", "check_replicas_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require((self.profile_at or 0) >= 0, "profile_at", "at least 0", self.profile_at)
        _require(len(set(self.trackers)) == len(self.trackers), "trackers", "different from each other", self.trackers)
        _require(self.stall_seconds is None or self.stall_seconds > 0, "stall_seconds", "above 0", self.stall_seconds)
        _require(self.straggler_factor > 1, "straggler_factor", "above 1", self.straggler_factor)
        starts = [change.from_step for change in self.ramp]
        _require(starts == sorted(set(starts)), "ramp", "in ascending order of from_step", starts)
        self.micro_batch_size(1)

    def batch_at(self, step: int) -> tuple[int, int]:
        """(batch_size, accumulate) of update `step`, where 0 is the first."""
        size, accumulate = self.batch_size, self.accumulate
        for change in self.ramp:
            if change.from_step <= step:
                size, accumulate = change.batch_size, change.accumulate
        return size, accumulate

    def micro_batch_size(self, world_size: int, step: int = 0) -> int:
        """Samples of one micro-batch of update `step` on one of `world_size` processes: the loader's batch size.

        Raises:
            ValueError: a batch size, this or a later one, does not divide evenly.
        """
        for at in (0, *(change.from_step for change in self.ramp)):
            size, accumulate = self.batch_at(at)
            if size % (accumulate * world_size):
                raise ValueError(
                    f"batch_size {size} must be a multiple of accumulate x processes = {accumulate} x {world_size}"
                )
        size, accumulate = self.batch_at(step)
        return size // (accumulate * world_size)


def load_recipe(path: str | Path, recipe_class: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe into a dataclass.

    Args:
        path: the YAML file. `${other.key}` stands for the value of another key of the file.
        recipe_class: a dataclass; fields may be dataclasses, and lists or dicts of them.
        overrides: "key=value" with dotted keys ("optimizer.groups[0].lr_scale=0.1"); the value is YAML.

    Raises:
        RecipeError: the file is missing or no YAML, or a key or value does not fit `recipe_class`.
    """
    path = Path(path)
    try:
        config = OmegaConf.create(path.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise RecipeError(f"{path}: no such recipe{_nearest(path.name, others)}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(config):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return _read(config, str(path), recipe_class, overrides)


def read_overrides(recipe_class: type[Recipe], overrides: Sequence[str]) -> Recipe:
    """A dataclass from "key=value" alone; arguments and errors as for `load_recipe`."""
    return _read(OmegaConf.create({}), recipe_class.__name__, recipe_class, overrides)


def _read(config: Any, name: str, recipe_class: type[Recipe], overrides: Sequence[str]) -> Recipe:
    sources = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r}: expected key=value")
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
            OmegaConf.update(config, key, typing.cast(dict, value)["value"])
        except (yaml.YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError) as error:
            raise RecipeError(f"override {override!r}: {_one_line(error)}") from None
        sources[key] = override
    try:
        values = OmegaConf.to_container(config, resolve=True)
        _check(recipe_class, values, "")
        return typing.cast(Recipe, OmegaConf.to_object(_structure(recipe_class, values)))
    except OmegaConfBaseException as error:
        raise RecipeError(f"{name}: {error.full_key}: {_one_line(error)}") from None
    except _FieldError as problem:
        by_override = [text for key, text in sources.items() if problem.key.startswith(key)]
        where = f"override {by_override[-1]!r}" if by_override else name
        raise RecipeError(f"{where}: {problem}") from None


def as_dict(recipe: Any) -> dict[str, Any]:
    """A recipe (any dataclass of this kind) as plain JSON values, all defaults written out."""
    values = OmegaConf.to_container(OmegaConf.structured(recipe), enum_to_str=True)
    return json.loads(json.dumps(values, default=str))  # tuples to lists, paths to strings


def dump(recipe: Any) -> str:
    """A recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


class _FieldError(ValueError):
    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def _check(kind: Any, value: Any, where: str) -> None:
    """Raises `_FieldError` with the full key of the first thing wrong, depth first.

    OmegaConf checks all this too, but inside lists its errors do not say which list and entry they mean.
    """
    kind = _without_none(kind, value)
    container, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _check_dataclass(kind, value, where)
    elif container in (list, tuple):
        if not isinstance(value, list):
            raise _FieldError(where, f"{where} must be a list, not {value!r}")
        if container is tuple and ... not in arguments and len(value) != len(arguments):
            raise _FieldError(where, f"{where} must have {len(arguments)} values, not {value!r}")
        for index, item in enumerate(value):
            _check(arguments[0] if arguments else Any, item, f"{where}[{index}]")
    elif container is dict:
        if not isinstance(value, dict):
            raise _FieldError(where, f"{where} must be a mapping, not {value!r}")
        for key, item in value.items():
            _check(arguments[1] if arguments else Any, item, f"{where}.{key}")


def _check_dataclass(kind: type, value: Any, where: str) -> None:
    keys = [f.name for f in dataclasses.fields(kind) if f.init]
    if not isinstance(value, dict):
        raise _FieldError(
            where, f"{where or 'the recipe'} must be a mapping with keys such as {keys[0]!r}, not {value!r}"
        )
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key, item in value.items():
        if key not in keys:
            known = [prefix + name for name in keys]
            elsewhere = [name for name in _all_keys(kind, prefix) if name.rpartition(".")[2] == key]
            hint = _nearest(f"{prefix}{key}", known) or _nearest(f"{prefix}{key}", elsewhere, cutoff=0)
            raise _FieldError(f"{prefix}{key}", f"unknown key '{prefix}{key}'{hint or '; known: ' + ', '.join(known)}")
        _check(hints[key], item, prefix + key)
    try:
        structured = _structure(kind, value)
        missing = sorted(OmegaConf.missing_keys(structured))
        if missing:
            raise _FieldError(where, "missing " + ", ".join(f"'{prefix}{name}'" for name in missing))
        OmegaConf.to_object(structured)
    except _FieldError:
        raise
    except OmegaConfBaseException as error:
        key = prefix + (error.full_key or "")
        raise _FieldError(key, f"{key.rstrip('.')}: {_one_line(error)}") from None
    except (ValueError, TypeError) as error:  # from a __post_init__
        raise _FieldError(where, prefix + _one_line(error)) from None


def _structure(kind: type, value: Any) -> Any:
    return OmegaConf.merge(OmegaConf.structured(kind), value)


def _without_none(kind: Any, value: Any) -> Any:
    """`X | None` to X, unless the value is None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and value is not None:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def _all_keys(kind: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        yield prefix + f.name
        inner = _without_none(hints[f.name], ...)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _all_keys(inner, f"{prefix}{f.name}.")


def _nearest(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type")))
