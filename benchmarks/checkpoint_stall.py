"""For how long training stands still for a checkpoint: written while it waits, and in the background.

    python benchmarks/checkpoint_stall.py [--gigabytes 1.2] [--rounds 5] [--folder .]

One process saves made tensors, as many bytes as the weights and moments of a model of 100 million parameters, in turns
the one way and the other. What counts in the background is the copy in the memory of the host alone: each save begins
once the one before is on disk. The first of each way is left out, since it allocates that memory. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from herdkit.train import TrainerConfig
from herdkit.train.saving import CheckpointWriter

TENSORS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    count = int(options.gigabytes * 1e9) // (4 * TENSORS)
    tensors = {f"model.{i}": torch.randn(count) for i in range(TENSORS)}
    seconds: dict[str, list[float]] = {"blocking": [], "background": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writers = {
            name: CheckpointWriter(
                Path(folder) / name,
                TrainerConfig(steps=1, batch_size=1, keep=1, background_checkpoints=name == "background"),
                None,
            )
            for name in seconds
        }
        for step in range(1, options.rounds + 2):
            for name, writer in writers.items():
                began = time.perf_counter()
                writer.save(step, tensors, {"step": step})
                seconds[name].append(time.perf_counter() - began)
                writer.wait()
    result: dict = {"benchmark": "checkpoint_stall", "gigabytes": options.gigabytes}
    result |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name, all_of_them in seconds.items():
        result[f"{name}_seconds"] = round(median(all_of_them[1:]), 4)
    pairs = zip(seconds["background"][1:], seconds["blocking"][1:], strict=True)
    result["ratio"] = round(median(a / b for a, b in pairs), 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
