"""Which parameters train, as data: ordered globs over parameter names, the last match wins."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from rich.table import Table
from torch import Tensor, nn

from . import parallel
from .config import FreezeRule
from .place import Place


@dataclass(frozen=True)
class FreezeRow:
    """One part of a model: the parameters under one top-level name, and how many of them train."""

    part: str
    parameters: int
    trainable: int


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter to all its names, in the model's order; a tied parameter has several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def require_matches(patterns: Iterable[str], names: dict[str, list[str]], what: str) -> None:
    """All processes call it: of a pipeline each has some of the parameters.

    Raises:
        ValueError: a pattern matches no parameter of any process; the message has the nearest names.
    """
    own = [name for aliases in names.values() for name in aliases]
    every = list(dict.fromkeys(chain.from_iterable(parallel.gather(own))))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            # Prefixes too, so that "imag.*" finds "image.*".
            globs = {f"{name.rsplit('.', depth)[0]}.*" for name in every for depth in range(1, name.count(".") + 1)}
            near = difflib.get_close_matches(pattern, [*every, *sorted(globs)], n=3, cutoff=0.4)
            nearest = ", ".join(near or every[:3])
            raise ValueError(f"{what} '{pattern}' matches no parameter; nearest: {nearest}")


def plan(model: nn.Module, rules: Sequence[FreezeRule], step: int) -> dict[str, bool]:
    """Whether each parameter is trained at an update. One that no rule matches stays as its requires_grad is.

    Raises:
        ValueError: a rule, of this update or a later one, matches no parameter.
    """
    names = parameter_names(model)
    require_matches((rule.pattern for rule in rules), names, "freeze rule")
    active = [rule for rule in rules if rule.from_step <= step]
    parameters = dict(model.named_parameters())
    trained = {}
    for name, aliases in names.items():
        trained[name] = parameters[name].requires_grad
        for rule in active:
            if any(fnmatchcase(alias, rule.pattern) for alias in aliases):
                trained[name] = rule.trainable
    return trained


def change_steps(rules: Sequence[FreezeRule]) -> list[int]:
    """The updates at which the plan may change; 0 is always among them."""
    return sorted({0, *(rule.from_step for rule in rules)})


def ever_trained(model: nn.Module, rules: Sequence[FreezeRule]) -> list[str]:
    """Names of the parameters that train at some update, in the model's order."""
    plans = [plan(model, rules, step) for step in change_steps(rules)]
    return [name for name in plans[0] if any(trained[name] for trained in plans)]


def apply_freeze(
    model: nn.Module, rules: Sequence[FreezeRule], step: int, elsewhere: Collection[str] = ()
) -> list[FreezeRow]:
    """Sets requires_grad, and train or eval mode, for an update.

    A module goes to eval mode when it has parameters, its own or its descendants', and all of them are
    frozen; a module without parameters (dropout) goes with the module around it. Gradients of frozen
    parameters are dropped.

    Args:
        elsewhere: parameters that count for another process.

    Raises:
        ValueError: a rule matches no parameter.
    """
    trained = plan(model, rules, step)
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
        if not trained[name]:
            parameter.grad = None
        if name in elsewhere:
            continue
        row = parts.setdefault(name.partition(".")[0], [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if trained[name] else 0
    set_modes(model)
    return [FreezeRow(part, *counts) for part, counts in parts.items()]


def set_modes(module: nn.Module, around: bool = True) -> None:
    """Train mode where something trains, eval mode elsewhere; see `apply_freeze`."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    module.train(any(flags) if flags else around)
    for child in module.children():
        set_modes(child, module.training)


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the requires_grad and the modes that it had before, and no gradients: what one
    stage froze is not what the next one finds."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def changing_buffers(model: nn.Module, trained: Iterable[str]) -> dict[str, Tensor]:
    """The persistent buffers, by name, that training may change: those of modules that are in train mode at
    some update, when the parameters named in `trained` are all that ever train."""
    parameters = dict(model.named_parameters())
    ids = {id(parameters[name]) for name in trained}
    buffers: dict[str, Tensor] = {}

    def visit(module: nn.Module, prefix: str, around: bool) -> None:
        flags = [id(parameter) in ids for parameter in module.parameters()]
        trains = any(flags) if flags else around
        if trains:
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    buffers[name] = buffer
        for name, child in module.named_children():
            visit(child, f"{prefix}.{name}" if prefix else name, trains)

    visit(model, "", True)
    return buffers


def of_all_stages(rows: Sequence[FreezeRow], place: Place) -> list[FreezeRow]:
    """The rows of all processes of a pipeline as those of one model."""
    parts: dict[str, FreezeRow] = {}
    for row in chain.from_iterable(parallel.gather(list(rows), place.group("pipeline"))):
        before = parts.get(row.part, FreezeRow(row.part, 0, 0))
        parts[row.part] = FreezeRow(row.part, before.parameters + row.parameters, before.trainable + row.trainable)
    return list(parts.values())


def freeze_table(rows: Sequence[FreezeRow], title: str) -> Table:
    """The rows for people to read."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    for row in rows:
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}")
    total = [sum(row.parameters for row in rows), sum(row.trainable for row in rows)]
    table.add_section()
    table.add_row("total", *(f"{count:,}" for count in total))
    return table
