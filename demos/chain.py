"""Trains stages that build on one another, each in its own process, two at a time where two are ready.

Models as small as the demo's gain little from a second thread, so two of them side by side on two cores take little
longer than one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..train.child import LOG, end_with_parent, log_to
from ..train.config import as_dict
from ..train.files import last_step, write_json
from ..train.recipe import Stage, StageRecipe, find_stage, read_stage_name

PACKAGE = Path(__file__).resolve().parent.parent
AT_ONCE = 2
PLAIN_SECONDS = 10.0
# Matrices this small gain little even from a second thread.
_CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


@dataclass(frozen=True, kw_only=True)
class Link:
    """One stage of the chain.

    Args:
        name: of the folder under `stages/` that it fills.
        title: what it is.
        recipe: its file, in the package.
        alone: runs with all cores and nothing beside it; the others have half of the cores each.
    """

    name: str
    title: str
    recipe: str
    alone: bool = False

    @property
    def path(self) -> Path:
        return PACKAGE / self.recipe

    @property
    def stage(self) -> Stage:
        return find_stage(read_stage_name(self.path))


class ChainError(RuntimeError):
    """A stage failed."""


@dataclass(kw_only=True)
class _Running:
    link: Link
    recipe: StageRecipe
    run_dir: Path
    process: Any
    task: TaskID
    started: float
    shown: float


class Chain:
    """
    Args:
        links: in the order in which they start where several could; each after those whose files it reads.
        stages: the folder that holds a folder for each of them.
        make_recipe: the recipe of a link, as it shall run.
        console: for progress and remarks.
        before_training: called before anything that is not finished is trained.

    `seconds` has the time that each link took in this start.
    """

    def __init__(
        self,
        links: Sequence[Link],
        stages: Path,
        make_recipe: Callable[[Link], StageRecipe],
        console: Console,
        before_training: Callable[[], None],
    ):
        self.links = links
        self.stages = stages
        self.recipes = {link.name: make_recipe(link) for link in links}
        self.console = console
        self.before_training = before_training
        self.seconds: dict[str, float] = {}
        # A process that has imported everything and done nothing else is forked: imports take seconds.
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(sorted({__name__, *(link.stage.run.__module__ for link in links)}))

    def train(self) -> None:
        """Trains what is not finished, or was planned otherwise.

        Raises:
            ChainError: a stage failed; the others are stopped, and the next start goes on from their checkpoints.
            ValueError: a link stands before one whose files it reads, so that none can start.
        """
        waiting = deque(self.links)
        running: list[_Running] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, speed_estimate_period=60) as self.progress:
            try:
                while waiting or running:
                    self._start_ready(waiting, running)
                    if waiting and not running:
                        raise ValueError(f"no link can start of {', '.join(link.name for link in waiting)}")
                    wait([one.process.sentinel for one in running], timeout=1.0)
                    for one in list(running):
                        self._show(one)
                        if not one.process.is_alive():
                            running.remove(one)
                            self._finish(one)
            finally:
                for one in running:
                    one.process.terminate()
                for one in running:
                    one.process.join()

    def _start_ready(self, waiting: deque[Link], running: list[_Running]) -> None:
        for link in list(waiting):
            if len(running) >= AT_ONCE or any(one.link.alone for one in running):
                return
            unfinished = {other.name for other in waiting} | {one.link.name for one in running}
            ready = unfinished.isdisjoint(self.upstream(link))
            if link.alone and (running or not ready):
                return
            if not ready:
                continue
            waiting.remove(link)
            started = self.start(link)
            if started is not None:
                running.append(started)

    def upstream(self, link: Link) -> list[str]:
        """The links whose files a link's recipe reads."""
        recipe = self.recipes[link.name]
        values = [getattr(recipe, name, "") for name in ("init", "encoder_weights")]
        files = map(Path, [*values, *getattr(recipe, "attach", [])])
        return sorted({file.relative_to(self.stages).parts[0] for file in files if file.is_relative_to(self.stages)})

    def start(self, link: Link) -> _Running | None:
        """Starts a link's process, unless it is finished as planned."""
        run_dir, recipe = self.stages / link.name, self.recipes[link.name]
        title = f"{self.links.index(link) + 1}/{len(self.links)} {link.title}"
        after = {name: json.loads((self.stages / name / "stage.json").read_text()) for name in self.upstream(link)}
        plan = {"recipe": as_dict(recipe), "after": {name: done["digest"] for name, done in after.items()}}
        plan_file = run_dir / "plan.json"
        if run_dir.exists() and not (plan_file.exists() and json.loads(plan_file.read_text()) == plan):
            self.console.print(f"{title}: planned otherwise before, trained anew")
            shutil.rmtree(run_dir)
        if (run_dir / "stage.json").exists():
            self.console.print(f"{title}: finished before")
            self.seconds[link.name] = 0.0
            return None
        self.before_training()
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(plan_file, plan)
        task = self.progress.add_task(title, total=recipe.trainer.steps)
        threads = _CORES if link.alone else max(1, _CORES // AT_ONCE)
        process = self.launch(link.stage, recipe, run_dir, threads)
        now = time.monotonic()
        return _Running(link=link, recipe=recipe, run_dir=run_dir, process=process, task=task, started=now, shown=now)

    def launch(self, stage: Stage, recipe: StageRecipe, run_dir: Path, threads: int) -> Any:
        """Starts the process that runs a stage."""
        process = self.processes.Process(target=run_stage, args=(stage, recipe, run_dir, threads), name=run_dir.name)
        process.start()
        return process

    def _show(self, one: _Running) -> None:
        done = last_step(one.run_dir / "metrics.jsonl")
        self.progress.update(one.task, completed=done)
        now = time.monotonic()
        if self.console.is_terminal or now - one.shown < PLAIN_SECONDS:
            return
        one.shown = now
        task = self.progress.tasks[self.progress.task_ids.index(one.task)]
        remaining = "?" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
        steps = one.recipe.trainer.steps
        self.console.print(f"{task.description} {done}/{steps} remaining {remaining}", highlight=False)

    def _finish(self, one: _Running) -> None:
        """
        Raises:
            ChainError: the process did not end well.
        """
        one.process.join()
        if one.process.exitcode != 0:
            log = one.run_dir / LOG
            last = (log.read_text().strip().splitlines() or [f"it ended with code {one.process.exitcode}"])[-1]
            raise ChainError(f"{one.link.title} failed: {last} (all of it in {log})")
        write_json(one.run_dir / "stage.json", {"digest": digest(one.run_dir / "plan.json")})
        self.seconds[one.link.name] = time.monotonic() - one.started


def run_stage(stage: Stage, recipe: StageRecipe, run_dir: Path, threads: int) -> None:
    """Runs in the link's own process; what it says goes to the log of `run_dir`."""
    end_with_parent()
    log_to(run_dir)
    torch.set_num_threads(threads)
    stage.run(recipe, run_dir)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
