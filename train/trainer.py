"""The loop that every stage trains in.

    result = train(model, loader, objective, trainer=..., optimizer=..., schedule=..., run_dir="runs/tiny")

An update sums gradients of `accumulate` micro-batches on each process, and over the processes, and divides
them once by the number of targets of all. Kill it at any moment and call it again: it goes on from the newest
whole checkpoint, on the same layout bit for bit as if nothing had happened.
"""

from __future__ import annotations

import signal
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from . import checkpoint, parallel
from .bad_samples import BadSampleLog
from .config import FreezeRule, OptimizerConfig, ScheduleConfig, TrainerConfig, as_dict
from .files import finite, write_json
from .freezing import apply_freeze, change_steps, ever_trained, flags_restored, freeze_table, of_all_stages, set_modes
from .gradients import clip, gradient_norm, summed_gradients
from .guard import Guard, Termination, termination
from .layout import LayoutError
from .meters import Meters
from .objective import Loader, Objective, Outcome, move
from .optimizer import build_optimizer, set_learning_rate
from .peak_flops import device_name, peak_flops
from .pipeline import Pipeline
from .place import Place
from .precision import native_precision
from .profiling import Profiling
from .progress import ProgressLine
from .replicas import replicated_state, require_equal
from .run_directory import RunDirectoryError, open_run, read_result
from .saving import CheckpointWriter
from .schedule import fraction
from .sharding import give_back_gathered
from .stage_copies import StageCopies
from .state import (
    capture,
    capture_random,
    fingerprint,
    require_same_frozen,
    restore,
    restore_random,
    same_random_afterwards,
    seed_everything,
)
from .stragglers import Stragglers
from .trackers import Trackers
from .watchdog import Watchdog

Evaluate = Callable[[Any, int], dict[str, float]]
FlopsOfUpdate = Callable[[int], float]


class LoaderExhaustedError(RuntimeError):
    """The loader ended before the run did."""


def train(
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    *,
    trainer: TrainerConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    freeze: Sequence[FreezeRule] = (),
    run_dir: str | Path,
    description: str = "train",
    resolved_recipe: dict[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    flops: FlopsOfUpdate | None = None,
    place: Place | None = None,
    pipeline: Pipeline | None = None,
) -> dict[str, Any]:
    """Trains a model in place, or resumes, or, where the run is finished, loads its final weights.

    Args:
        model: on the device to train on; what is to be trained is float32 (or float64), what is frozen may be
            of any precision. On resume, frozen parameters must be those of the first start. Afterwards it has
            the modes and the requires_grad that it had before.
        loader: micro-batches of `trainer.micro_batch_size(place.layout.data, step)` samples, those of group
            `place.data`. Where its data end in the middle of an update, the update is made of what there is.
        freeze: see `freezing.plan`; parameters that no rule names keep their requires_grad.
        run_dir: holds everything about the run; the same one resumes it.
        resolved_recipe: JSON values, recorded and compared on resume beside the configs given here.
        evaluate: called as `evaluate(model, step)` on every process, in eval mode, without gradients, under
            the same autocast; it may draw random numbers. The first process's values are logged.
        flops: called as `flops(step)`; the model's operations in that update over all processes, forward and backward.
            Where it is given and the device's peak is known, the log has the utilisation ("mfu").
        place: this process's, in the layout for which the model is distributed already. Default: every process has the
            whole model and takes samples of its own.
        pipeline: runs the micro-batches of an update through the stages of the model; the objective is then its own.

    Returns:
        The content of result.json: "description", "steps", "samples", "tokens", "wall_seconds" (over all
        starts), "elapsed_seconds" and "effective_time" (see `EffectiveTime`), "checkpoint_seconds" (for which
        training stood still, since the last start), "parameters", "trained_parameters",
        "last" (last line of the log), "mean" (loss and metrics over the run), "evaluation", "skipped_steps",
        "empty_steps", "bad_samples" (left out, see bad_samples.jsonl), "peak_memory_bytes".

    Raises:
        ValueError: a config does not fit the model or the processes.
        RunDirectoryError: the directory holds a run of another recipe, or a longer one.
        CheckpointError: the checkpoint there does not fit the model.
        NonFiniteError: see TrainerConfig.non_finite.
        LossSpikeError: see TrainerConfig.spikes.
        ReplicaError: see TrainerConfig.check_replicas_every.
        LoaderExhaustedError: the loader ended early; the message says how many updates and samples it held.
        SystemExit: after SIGTERM, once the update at hand is made and a checkpoint written.
    """
    with flags_restored(model):
        run = _Run(
            model=model,
            loader=loader,
            objective=objective,
            config=trainer,
            optimizer_config=optimizer,
            schedule=schedule,
            freeze=freeze,
            run_dir=Path(run_dir),
            description=description,
            resolved_recipe=resolved_recipe or {},
            evaluate=evaluate,
            flops=flops,
            place=place or Place(),
            pipeline=pipeline,
        )
        return run.finished or run.to_the_end()


@dataclass(kw_only=True)
class _Run:
    """One call of `train`: what it was given, what it built, and where it stands."""

    model: nn.Module
    loader: Loader
    objective: Objective
    config: TrainerConfig
    optimizer_config: OptimizerConfig
    schedule: ScheduleConfig
    freeze: Sequence[FreezeRule]
    run_dir: Path
    description: str
    resolved_recipe: dict[str, Any]
    evaluate: Evaluate | None
    flops: FlopsOfUpdate | None
    place: Place
    pipeline: Pipeline | None

    step: int = 0
    """Finished updates."""
    finished: dict[str, Any] | None = None
    evaluation: dict[str, float] | None = None
    checkpoint_seconds: float = 0.0

    def __post_init__(self) -> None:
        parallel.require_process_group()
        self.config.micro_batch_size(self.place.layout.data)
        self.device = next(self.model.parameters()).device
        if self.config.precision == "auto":
            self.config = replace(self.config, precision=parallel.on_first(lambda: native_precision(self.device)))
        if self.place.config.gather == "bfloat16" and self.config.precision != "bfloat16":
            raise LayoutError("gather", f"'bfloat16' needs trainer.precision bfloat16, not {self.config.precision}")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        configs = {"optimizer": self.optimizer_config, "schedule": self.schedule}
        self.recipe: dict[str, Any] = {name: as_dict(config) for name, config in configs.items()}
        self.recipe |= {"freeze": [as_dict(rule) for rule in self.freeze], **self.resolved_recipe}
        self.recipe["trainer"] = as_dict(self.config)  # what is done, where "auto" was asked for

        self.copies = StageCopies((name for name, _ in self.model.named_parameters()), self.place)
        self.trained = ever_trained(self.model, self.freeze)
        if not any(parallel.gather(self.trained)):
            raise ValueError("nothing to train: every parameter is frozen")
        self.optimizer = build_optimizer(self.model, self.trained, self.optimizer_config)
        self.frozen = fingerprint(self.model, self.trained)
        if self.pipeline:
            self.frozen = dict(ChainMap(*parallel.gather(self.frozen, self.place.group("pipeline"))))
        self._open()

    def _open(self) -> None:
        """Finds where to go on, and goes there."""
        silent = parallel.rank() > 0
        self.progress = ProgressLine(self.description, self.config.steps, silent=silent)
        newest = parallel.on_first(lambda: open_run(self.run_dir, self.recipe, self.progress.say))
        saved = checkpoint.read_state(newest) if newest else {}
        if newest:
            self._restore(newest, saved)
        else:
            fresh = capture(self.model, self.optimizer, self.trained).values()
            parallel.broadcast([t for t in fresh if not isinstance(t, DTensor)], self.place.group("positions"))
        trackers = () if self.finished else self.config.trackers
        self.trackers = Trackers(trackers, self.run_dir, self.step, self.recipe)
        if len(saved.get("random", [])) == parallel.world_size():
            restore_random(saved["random"][parallel.rank()])
        else:  # a fresh start, or another number of processes
            seed_everything(self.config.seed, self.place.random_stream, self.step)
        self.guard = Guard(self.config.non_finite, self.config.spikes, saved.get("guard"))
        self.writer = CheckpointWriter(self.run_dir, self.config, newest)
        self.peak = peak_flops(device_name(self.device), self.config.precision)
        peak = self.peak and self.peak * parallel.world_size()
        self.meters = Meters(self.run_dir, self.step, saved.get("meters"), peak, self.device, self.trackers)
        self.profiling = Profiling(self.run_dir, self.config.profile_at, self.device, self.progress.say)
        self.bad_samples = BadSampleLog(self.run_dir, self.loader, self.step)
        self.progress.first = self.step
        self.stragglers = Stragglers(self.config.straggler_factor, self.progress.say, self.device)
        ends = self.config.stall_action == "exit"
        self.watchdog = Watchdog(self.run_dir, self.config.stall_seconds, ends, self.description)

    def _restore(self, path: Path, saved: dict[str, Any]) -> None:
        self.step = saved["step"]
        if self.step > self.config.steps:
            raise RunDirectoryError(
                f"{self.run_dir} is at step {self.step} already, past trainer.steps {self.config.steps}"
            )
        require_same_frozen(path, saved["frozen"], self.frozen)
        restore(path, self.model, self.optimizer, self.trained)
        if self.step == self.config.steps:
            self.finished = parallel.on_first(lambda: read_result(self.run_dir, self.step))
        if self.finished is not None:
            self.progress.say(f"{self.description}: finished already; {path} is loaded")
        else:
            self.loader.load_state_dict(saved["loader"])
            self.progress.say(f"{self.description}: resuming at step {self.step} from {path}")

    def _apply_freeze(self) -> None:
        rows = apply_freeze(self.model, self.freeze, self.step, self.copies.elsewhere)
        self.rows = of_all_stages(rows, self.place) if self.pipeline else rows
        self.parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.progress.say(freeze_table(self.rows, f"{self.description}: what trains from step {self.step} on"))

    def to_the_end(self) -> dict[str, Any]:
        """The loop."""
        config = self.config
        with (
            self.progress,
            termination() as wish,
            self.trackers,
            self._start(),
            self.watchdog,
            self.profiling,
            self.writer,
        ):
            batches = iter(self.loader)
            changes = {step for step in change_steps(self.freeze) if step > self.step}
            if self._evaluation_due():  # it was killed between its checkpoint and its evaluation
                self.evaluation = self.meters.evaluation_of(self.step)
                if self.evaluation is None:
                    self._evaluate()
            while self.step < config.steps:
                if self.step in changes:
                    self._apply_freeze()
                with self.meters.pause():
                    self.profiling.turn(self.step)
                self.meters.effective.begin_update()
                stopping = self._update(batches, wish)
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    self.bad_samples.collect(self.step)
                    self.meters.log(self.step, self.lr, self.norm, self.guard.skipped, self.stragglers.report())
                if self.config.check_replicas_every and self.step % self.config.check_replicas_every == 0:
                    self._check_replicas()
                if last or self.progress.due():
                    self.progress.update(self.step, self.meters.status())
                if self.step % config.checkpoint_every == 0 or last or stopping:
                    self._save()
                if stopping and not last:
                    self.progress.say(f"{self.description}: told to terminate; saved at step {self.step}")
                    raise SystemExit(128 + signal.SIGTERM)
                if self._evaluation_due():
                    self._evaluate()
        return self._result()

    def _start(self) -> AbstractContextManager[None]:
        self._apply_freeze()
        return self.meters.effective.start(
            self.step,
            device=device_name(self.device),
            peak_flops=self.peak,
            processes=parallel.world_size(),
            parts=[asdict(row) for row in self.rows],
        )

    def _update(self, batches: Iterator[Any], wish: Termination) -> bool:
        """One update of the weights; returns whether any process was told to terminate."""
        # loss, targets, wishes to stop, wishes for a profile
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        metrics = []
        batch_size, accumulate = self.config.batch_at(self.step)
        given = 0

        def counted() -> Iterator[Any]:
            nonlocal given
            for batch in islice(batches, accumulate):
                given += 1
                self.watchdog.note(self.step, f"micro-batch {given} of {accumulate}")
                yield batch
                self.watchdog.note(self.step, "waiting for data")

        self.watchdog.note(self.step, "waiting for data")
        self.stragglers.begin()
        if self.pipeline is not None:
            outcomes = self.pipeline(counted(), self.device, self.autocast)
        else:
            outcomes = self._one_by_one(counted())
        for loss, count, measured in outcomes:
            if self.place.counts:
                totals[0] += loss.detach()
                totals[1] += count
                metrics.append(measured)
        self.stragglers.end()
        if not given:
            raise LoaderExhaustedError(self._what_the_data_held())
        totals[2] += wish.requested
        totals[3] += self.profiling.wanted()
        self.watchdog.note(self.step, "sum of gradients")
        with self.meters.gradient_sum.measured():
            loss_sum, targets, stopping, profiling = parallel.sum_all(totals).tolist()
            gradients = summed_gradients(self.parameters, self.place, self.copies)
        self.profiling.agreed = profiling > 0
        if gradients:
            torch._foreach_div_(list(gradients.values()), targets or 1.0)  # pyright: ignore[reportPrivateImportUsage]
        norm = gradient_norm(dict(self.parameters), gradients, self.place, self.copies)
        self.lr = self.optimizer_config.lr * fraction(self.schedule, self.step, self.config.steps)
        self.norm = norm.item()
        self.guard.last_good = self.writer.last_good
        objection = self.guard.objection(self.step, loss_sum, targets, self.norm, gradients)
        if objection is None:
            if self.optimizer_config.clip_norm is not None:
                clip(gradients, norm, self.optimizer_config.clip_norm)
            set_learning_rate(self.optimizer, self.lr)
            self.optimizer.step()
            flops = None if self.flops is None else self.flops(self.step) * given / accumulate
            self.meters.update(loss_sum, targets, batch_size * given // accumulate, metrics, flops)
        else:
            self.progress.say(f"{self.description}: {objection}")
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return stopping > 0

    def _one_by_one(self, batches: Iterable[Any]) -> Iterator[Outcome]:
        for batch in batches:
            if batch is None:  # the data end with this step, and nothing is left for this process
                continue
            with self.autocast:
                outcome = self.objective(self.model, move(batch, self.device))
            if outcome[0].requires_grad:
                outcome[0].backward()
            yield outcome

    def _what_the_data_held(self) -> str:
        consumed = getattr(self.loader, "consumed", None)
        samples = "" if consumed is None else f", all {consumed:,} samples of its data taken"
        return (
            f"the loader ended at step {self.step} of {self.config.steps}{samples}: let it repeat its data "
            f"(data.sources[].epochs), or set trainer.steps to {self.step}"
        )

    def _check_replicas(self) -> None:
        tensors = replicated_state(self.model, self.optimizer)
        sharded = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
        whole = {name: t for name, t in tensors.items() if name not in sharded}

        def compare() -> None:
            for part, group in ((sharded, self.place.group("replicate")), (whole, self.place.group("positions"))):
                of_process = {name: parallel.local(tensor) for name, tensor in part.items()}
                require_equal(of_process, f"step {self.step}", self.writer.last_good, group)

        parallel.on_each(compare)  # every group of replicas for itself; all stop where one differs

    def _save(self) -> None:
        self.watchdog.note(self.step, "checkpoint", long=True)
        if self.config.check_replicas_every:
            self._check_replicas()
        began = time.monotonic()
        with self.meters.pause():
            self.bad_samples.collect(self.step)
            state = {
                "step": self.step,
                "random": parallel.gather(capture_random()),
                "loader": self.loader.state_dict(),
                "freeze": self.recipe["freeze"],
                "frozen": self.frozen,
                "meters": self.meters.state_dict(),
                "guard": self.guard.state_dict(),
            }
            tensors = capture(self.model, self.optimizer, self.trained)
            self.writer.save(self.step, tensors, state)
        self.checkpoint_seconds += time.monotonic() - began

    def _evaluation_due(self) -> bool:
        every = self.config.evaluate_every
        at_interval = every is not None and self.step % every == 0 and self.step > 0
        return self.evaluate is not None and (at_interval or self.step == self.config.steps)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        self.watchdog.note(self.step, "evaluation", long=True)
        self.model.eval()
        with self.meters.pause(), same_random_afterwards(), torch.no_grad(), self.autocast:
            self.evaluation = self.evaluate(self.model, self.step)
        for module in (self.model, *(self.pipeline.stages.values() if self.pipeline else ())):
            give_back_gathered(module)
        set_modes(self.model)
        self.meters.log_evaluation(self.step, self.evaluation)

    def _result(self) -> dict[str, Any]:
        result = {
            "description": self.description,
            "steps": self.step,
            "samples": self.meters.samples,
            "tokens": round(self.meters.tokens),
            "wall_seconds": self.meters.wall_seconds(),
            "elapsed_seconds": self.meters.effective.elapsed(),
            "effective_time": self.meters.effective.fraction(),
            "checkpoint_seconds": self.checkpoint_seconds,
            "parameters": sum(row.parameters for row in self.rows),
            "trained_parameters": self._ever_trained_parameters(),
            "last": self.meters.last,
            "mean": self.meters.means(),
            "evaluation": self.evaluation,
            "skipped_steps": self.guard.skipped,
            "empty_steps": self.guard.empty,
            "bad_samples": getattr(self.loader, "bad_count", 0),
            "peak_memory_bytes": self.meters.peak_memory,
        }
        result = parallel.on_first(lambda: finite(result))
        parallel.on_first(lambda: write_json(self.run_dir / "result.json", result))
        return result

    def _ever_trained_parameters(self) -> int:
        counts = {name: p.numel() for name, p in self.model.named_parameters()}
        own = sum(counts[name] for name in self.trained if name not in self.copies.elsewhere)
        return sum(parallel.gather(own, self.place.group("pipeline"))) if self.pipeline else own
