"""Pipelines: the layers of a model on several processes, through which micro-batches run one behind the other
(section 3.3.2). Torch runs them; the order of the passes is the paper's, with which any number of micro-batches will
do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import FORWARD, FULL_BACKWARD, _Action, _PipelineScheduleRuntime

from .layout import ParallelConfig, passes_in_flight, run_length
from .objective import Outcome, move
from .place import Place


class StageModule(nn.Module):
    """One stage of a pipeline, as torch's stages call it. To be given to `fully_shard` as a whole.

    Args:
        part: the modules of the stage.
        run: called as `run(part, x, batch)`, where x is what the stage before gave, or None in the first one; gives
            what the next one takes, in the last one what the loss is made of. With it may come a loss of the stage's
            own, which is trained together with the pipeline's, or None.

    Attributes:
        outcomes: with the stage's own losses, of the micro-batches that ran since they were cleared.
    """

    def __init__(
        self, part: nn.Module, run: Callable[[Any, Tensor | None, Any], Tensor | tuple[Tensor, Outcome | None]]
    ):
        super().__init__()
        self.part, self.run = part, run
        self.micro_batches: Sequence[Any] = ()
        self.outcomes: list[Outcome] = []
        self.precision: AbstractContextManager[Any]

    def forward(self, x: Tensor, *, number: Tensor) -> Tensor:
        # The schedule hands on one tensor; the rest of a micro-batch is there on every process, under its number.
        batch = self.micro_batches[int(number)]
        with self.precision:
            given = self.run(self.part, None if x.dtype == torch.int64 else x, batch)
        given, own = given if isinstance(given, tuple) else (given, None)
        if own is not None and torch.is_grad_enabled():
            self.outcomes.append((own[0].detach(), *own[1:]))
            given = _with_loss(given, own[0])
        # Torch's backward pass of a stage wants something to go back through, in a stage that is frozen, too.
        return given if given.requires_grad or not torch.is_grad_enabled() else given.requires_grad_()


def _with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, whose backward pass is one of the loss, too."""
    return _WithLoss.apply(x, loss)  # type: ignore[return-value]


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.one


class Handed(NamedTuple):
    """The shape of what a stage hands to the next one, and of what the last one gives."""

    between: tuple[int, ...]
    last: tuple[int, ...]
    dtype: torch.dtype


class Pipeline:
    """This process's stages, and the schedule that runs them.

    Args:
        stages: by their number among all; those of `herdkit.train.layout.ParallelConfig`, every `pipeline`-th.
        objective: called as `objective(part, x, batch)` with the last stage's part and what it gave; gives what an
            `Objective` gives.
        handed: called as `handed(batch)`; the same for all micro-batches of an update.
        alike: makes it so, of the micro-batches of an update; by default they are alike.
    """

    def __init__(
        self,
        place: Place,
        stages: dict[int, StageModule],
        objective: Callable[[Any, Tensor, Any], Outcome],
        handed: Callable[[Any], Handed],
        alike: Callable[[list[Any]], list[Any]] = lambda batches: batches,
    ):
        self.place, self.stages, self.objective, self.handed, self.alike = place, stages, objective, handed, alike
        self._schedule: tuple[tuple[int, Handed], _Schedule] | None = None
        self._outcomes: list[Outcome] = []

    def __call__(
        self, batches: Iterable[Any], device: torch.device, precision: AbstractContextManager[Any]
    ) -> list[Outcome]:
        """Runs micro-batches forward and backward; gradients add up in the parameters.

        Args:
            precision: the autocast under which stages and objective run; the backward pass does not.

        Returns: in the process with the last stage what the objective gave for each; in every one, its stages' own
            losses.
        """
        micro_batches = self.alike([move(batch, device) for batch in batches])
        self._outcomes = []
        if not micro_batches:
            return []
        for module in self.stages.values():
            module.micro_batches, module.precision = micro_batches, precision
            module.outcomes = []
        kind = (len(micro_batches), self.handed(micro_batches[0]))
        if self._schedule is None or self._schedule[0] != kind:
            # Only the newest: each has memory for what it receives, and dialogs are of any length.
            self._schedule = kind, self._make_schedule(*kind, device)
        numbers = torch.arange(len(micro_batches))
        first = (numbers,) if 0 in self.stages else ()
        self._schedule[1].step(*first, number=numbers, target=numbers, return_outputs=False)
        return [*self._outcomes, *(outcome for module in self.stages.values() for outcome in module.outcomes)]

    @torch.no_grad()
    def last_output(self, batch: Any, device: torch.device) -> tuple[Any, Tensor] | None:
        """Runs one batch forward, without gradients, under the precision at hand, stage after stage.

        Returns: in the process with the last stage its part and what it gave, in the others None.
        """
        batch, group = move(batch, device), self.place.group("pipeline")
        shape, _, dtype = self.handed(batch)
        processes, total = self.place.config.pipeline, self.place.config.pipeline * self.place.config.chunks
        for index, module in sorted(self.stages.items()):
            module.micro_batches, module.precision = [batch], nullcontext()
            x = torch.zeros(1, dtype=torch.int64)
            if index > 0:
                x = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(x, group=group, group_src=(index - 1) % processes)
            x = module(x, number=torch.zeros(1, dtype=torch.int64))
            if index == total - 1:
                return module.part, x
            dist.send(x.contiguous(), group=group, group_dst=(index + 1) % processes)
        return None

    def _loss(self, x: Tensor, number: Tensor) -> Tensor:
        last = self.stages[max(self.stages)]
        with last.precision:
            outcome = self.objective(last.part, x, last.micro_batches[int(number)])
        self._outcomes.append(outcome)
        return outcome[0]

    def _make_schedule(self, count: int, handed: Handed, device: torch.device) -> _Schedule:
        parallel = self.place.config
        total = parallel.pipeline * parallel.chunks
        between, last = (torch.empty(shape, dtype=handed.dtype, device="meta") for shape in handed[:2])
        number = torch.empty(1, dtype=torch.int64, device="meta")
        stages = [
            PipelineStage(
                module,
                index,
                total,
                device,
                input_args=number if index == 0 else between,
                output_args=last if index == total - 1 else between,
                group=self.place.group("pipeline"),
            )
            for index, module in self.stages.items()
        ]
        return _Schedule(stages, count, order_of_passes(parallel, count), self._loss)


Passes = list[list[tuple[int, bool, int]]]
"""What each process of a pipeline does in turn: (stage, whether forward, micro-batch)."""


class _Schedule(_PipelineScheduleRuntime):
    def __init__(self, stages: list[PipelineStage], count: int, order: Passes, loss: Callable[..., Tensor]):
        super().__init__(stages, count, loss, scale_grads=False)  # type: ignore[arg-type]
        actions: dict[int, list[_Action | None]] = {
            process: [_Action(stage, FORWARD if ahead else FULL_BACKWARD, number) for stage, ahead, number in passes]
            for process, passes in enumerate(order)
        }
        self._prepare_schedule_with_comms(actions)


def order_of_passes(parallel: ParallelConfig, count: int) -> Passes:
    """The passes of `count` micro-batches.

    A stage takes `run_length` of them in a row before the process goes on to its next stage (N in the paper); after as
    many forward passes as must be in flight, backward and forward passes take turns.
    """
    run, orders = run_length(parallel, count), []
    for process in range(parallel.pipeline):
        stages = range(process, parallel.pipeline * parallel.chunks, parallel.pipeline)
        groups = np.array_split(range(count), math.ceil(count / run))
        forward = [(stage, True, number) for group in groups for stage in stages for number in group.tolist()]
        backward = [
            (stage, False, number) for group in groups for stage in reversed(stages) for number in group.tolist()
        ]
        ahead = passes_in_flight(parallel, process, count)
        order = forward[:ahead]
        for i, action in enumerate(backward):
            order += [action, *forward[ahead + i : ahead + i + 1]]
        orders.append(order)
    return orders
