"""How the demo's stages use two cores: one process of one thread, one of two threads, and two processes of one thread
side by side, in turns. `python benchmarks/threads.py runs/tiny-herd` (a finished demo); prints updates per second of
all processes together, as multiples of the one of one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path

from herdkit.demos.chain import run_stage
from herdkit.demos.tiny_herd import CHAIN, tiny_recipe

LAYOUTS = ((1, 1), (1, 2), (2, 1))
"""Processes and threads of each."""
WARM = 10


def updates_per_second(link, out: Path, processes: int, threads: int, steps: int) -> float:
    recipe = tiny_recipe(link, out, seed=0, quick=False)
    recipe.trainer.steps, recipe.trainer.log_every, recipe.trainer.checkpoint_every = steps, WARM, 10 * steps
    recipe.schedule.warmup_steps = 1
    if recipe.schedule.decay_steps is not None:
        recipe.schedule.decay_steps = 1
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        run_dirs = [Path(folder) / str(i) for i in range(processes)]
        started = []
        for run_dir in run_dirs:
            run_dir.mkdir()
            started.append(spawn.Process(target=run_stage, args=(link.stage, recipe, run_dir, threads)))
            started[-1].start()
        for process in started:
            process.join()
            if process.exitcode:
                raise SystemExit(f"{link.name} failed: {(run_dirs[0] / 'log.txt').read_text()}")
        rates = []
        for run_dir in run_dirs:
            seconds = [
                json.loads(line)["wall_seconds"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
            ]
            rates.append((steps - WARM) / (seconds[-1] - seconds[0]))
    return sum(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print(f"{'stage':24} {'1 x 1 /s':>9} {'1 x 2':>6} {'2 x 1':>6}")
    for link in CHAIN:
        rates = [updates_per_second(link, options.demo.resolve(), *layout, options.steps) for layout in LAYOUTS]
        print(f"{link.name:24} {rates[0]:9.2f} {rates[1] / rates[0]:6.2f} {rates[2] / rates[0]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
