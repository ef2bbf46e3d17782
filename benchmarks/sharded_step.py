"""An update of a small language model on two processes, its weights in shards: by the trainer, and by a bare loop
around torch's `fully_shard`, in turns.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/sharded_step.py [--rounds 5] [--updates 20]

Both do the same: forward, summed cross-entropy, backward, division by the number of targets of all processes, clipping,
AdamW. The trainer besides logs, guards and counts. The bare loop has torch's own cross-entropy over whole logits with
--plain-loss, else the one of the trainer's objective. Prints one JSON line: medians over all updates but the first of a
round, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.distribute import distribute
from herdkit.text.objective import next_token
from herdkit.text.rows import TokenBatch
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig, parallel, train
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn import functional as F

CONFIG = TransformerConfig(
    dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=688, vocab_size=4096, max_seq_len=256
)  # 6.5 million parameters
ROWS, LENGTH = 4, 256


class Clock:
    """The same batch over and over; notes when it is asked for, which is once an update."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(parallel.rank())
        tokens = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH), generator=draw)
        self.batch, self.times = TokenBatch(tokens, tokens.roll(-1, 1)), list[float]()

    def __iter__(self) -> Iterator[TokenBatch]:
        while True:
            self.times.append(time.perf_counter())
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def updates(self) -> list[float]:
        """Seconds of each update but the first and the last."""
        return [b - a for a, b in zip(self.times[1:-1], self.times[2:], strict=True)]


def by_trainer(updates: int) -> list[float]:
    torch.manual_seed(0)
    model, place, clock = Transformer(CONFIG), Place(ParallelConfig(shard=2)), Clock()
    distribute(model, place)
    run_dir = Path(parallel.on_first(tempfile.mkdtemp))
    train(
        model,
        clock,
        next_token,
        trainer=TrainerConfig(steps=updates, batch_size=ROWS * place.layout.data),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(),
        run_dir=run_dir,
        place=place,
    )
    parallel.on_first(lambda: shutil.rmtree(run_dir))
    return clock.updates()


def bare(plain_loss: bool, updates: int) -> list[float]:
    torch.manual_seed(0)
    model, clock = Transformer(CONFIG), Clock()
    for module in (*model.layers, model):
        fully_shard(module, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = iter(clock)
    for _ in range(updates):
        batch = next(batches)
        if plain_loss:
            loss, count = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten()), torch.ones(())
        else:
            loss, count, _ = next_token(model, batch)
            count = count.double()
        loss.backward()
        dist.all_reduce(count)
        torch._foreach_div_([p.grad.to_local() for p in model.parameters()], count.item() / dist.get_world_size())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.updates()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--plain-loss", action="store_true")
    options = parser.parse_args()
    with parallel.process_group():
        ways: dict[str, Callable[[], list[float]]] = {
            "bare": lambda: bare(options.plain_loss, options.updates),
            "trainer": lambda: by_trainer(options.updates),
        }
        rounds = [{name: way() for name, way in ways.items()} for _ in range(options.rounds)]
        if parallel.rank() == 0:
            result: dict[str, Any] = {"benchmark": "sharded_step", "processes": parallel.world_size()}
            result |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
            for name in ways:
                result[f"{name}_seconds"] = round(median(value for one in rounds for value in one[name]), 4)
            result["ratio"] = round(median(median(one["trainer"]) / median(one["bare"]) for one in rounds), 3)
            print(json.dumps(result))


if __name__ == "__main__":
    main()
