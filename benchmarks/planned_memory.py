"""Memory that training takes in a layout, beside what `herdkit plan` says, in eager float32 on CPUs.

    python benchmarks/planned_memory.py

Trains a language model of 32 million parameters for two updates in processes of their own, one layout after another,
and reads how much the peak of resident memory of each process grew over that after the same with a tiny model, which
loads the libraries. The C library is told to give back what is freed: what it keeps otherwise is a fifth to three
fifths more, and nothing that a plan could know. The plan is without what it reserves for the libraries. Prints one JSON
line; "ratio" is the plan over the process that took most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.distribute import distribute, of_own_positions
from herdkit.text.objective import next_token
from herdkit.text.parallel import shares
from herdkit.text.plan_memory import Load, memory_bytes
from herdkit.text.rows import TokenBatch
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig, parallel, train
from herdkit.train.layout import ParallelConfig, lay_out
from herdkit.train.place import Place

CONFIG = TransformerConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=1408, vocab_size=8192, max_seq_len=256)
TINY = TransformerConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=32, vocab_size=256, max_seq_len=256)
ROWS, LENGTH = 8, 256
"""Of a micro-batch on one process or group of processes, and the tokens of each."""

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (1, 2, {}),
    "recompute": (1, 2, {"recompute": "full"}),
    "shards": (2, 2, {"shard": 2}),
    "tensor": (2, 2, {"tensor": 2}),
    "context": (2, 2, {"context": 2}),
    "pipeline": (2, 4, {"pipeline": 2}),
}
"""Processes, micro-batches of an update, and the layout."""


class Rows:
    def __init__(self, config: TransformerConfig):
        self.config = config

    def __iter__(self):
        draw = torch.Generator().manual_seed(0)
        while True:
            tokens = torch.randint(self.config.vocab_size, (ROWS, LENGTH), generator=draw)
            yield TokenBatch(tokens, tokens.roll(-1, 1))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str) -> None:
    with parallel.process_group():
        train_briefly(TINY, case)
        before = peak()
        train_briefly(CONFIG, case)
        grown = parallel.gather(peak() - before)
        if parallel.rank() == 0:
            print(json.dumps(grown))


def train_briefly(config: TransformerConfig, case: str) -> None:
    _, micro_batches, layout = CASES[case]
    place = Place(ParallelConfig(**layout))
    torch.manual_seed(0)
    model = Transformer(config)
    pipeline = distribute(model, place)
    run_dir = Path(parallel.on_first(tempfile.mkdtemp))
    train(
        model,
        Rows(config),
        of_own_positions(next_token, place),
        trainer=TrainerConfig(steps=2, batch_size=ROWS * micro_batches * place.layout.data, accumulate=micro_batches),
        optimizer=OptimizerConfig(lr=1e-4),
        schedule=ScheduleConfig(),
        run_dir=run_dir,
        place=place,
        pipeline=pipeline,
    )
    parallel.on_first(lambda: shutil.rmtree(run_dir))


def planned(case: str) -> list[int]:
    """Of every process of the pipeline."""
    processes, micro_batches, layout = CASES[case]
    config = ParallelConfig(**layout)
    load = Load(row_length=LENGTH, rows=ROWS, micro_batches=micro_batches, width=4)
    laid_out = lay_out(config, processes)
    found = []
    for place, share in shares(CONFIG, config, laid_out).items():
        parts = memory_bytes(CONFIG, config, laid_out, load, place, share)
        found.append(parts["total"] - parts["reserved"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        measure(options.case)
        return
    result: dict[str, Any] = {"benchmark": "planned_memory", "torch": torch.__version__}
    result["device"] = platform.processor() or platform.machine()
    for case, (processes, _, _) in CASES.items():
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*start, __file__, "--case", case],
            check=True,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "1000000",
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
            },
        )
        grown = json.loads(done.stdout.splitlines()[-1])
        plan = max(planned(case))
        result[case] = {"measured": max(grown), "planned": plan, "ratio": round(plan / max(grown), 3)}
        print(case, result[case], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
