"""An update of a small language model in one process, its layers compiled (`parallel.compile: inductor`) and not, in
turns.

    OMP_NUM_THREADS=1 python benchmarks/compiled_step.py [--updates 20] [--precision float32] [--recompute none]

Times are the processor's, of all threads of the process, so that work beside it disturbs them little. The first update
of the compiled model, which compiles, is told apart. Prints one JSON line; "ratio" is the median of compiled / eager,
"gradients_differ_by" the largest difference in the first update, relative to the weight's largest gradient.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.distribute import distribute
from herdkit.text.objective import next_token
from herdkit.text.rows import TokenBatch
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place

CONFIG = TransformerConfig(
    dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=688, vocab_size=4096, max_seq_len=256
)  # 6.5 million parameters
ROWS, LENGTH = 4, 256


def updates(precision: str, parallel: ParallelConfig) -> tuple[Transformer, Callable[[], float]]:
    """A model, and what makes an update of it, which leaves its gradients, and gives the seconds."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    distribute(model, Place(parallel))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH))
    batch = TokenBatch(tokens, tokens.roll(-1, 1))

    def update() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss, count, _ = next_token(model, batch)
        (loss / count).backward()
        optimizer.step()
        return time.process_time() - start

    return model, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    options = parser.parse_args()
    (model, eager), (other, compiled) = (
        updates(options.precision, ParallelConfig(recompute=options.recompute, compile=how))
        for how in ("none", "inductor")
    )
    eager()
    started = time.perf_counter()
    compiled()
    compilation = time.perf_counter() - started
    differences = [
        ((b.grad - a.grad).abs().max() / a.grad.abs().max()).item()  # type: ignore[union-attr,operator]
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    ]
    pairs = [(eager(), compiled()) for _ in range(options.updates)]
    result = {
        "benchmark": "compiled_step",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        "recompute": options.recompute,
        "eager_seconds": round(median(pair[0] for pair in pairs), 4),
        "compiled_seconds": round(median(pair[1] for pair in pairs), 4),
        "ratio": round(median(after / before for before, after in pairs), 3),
        "first_update_seconds": round(compilation, 1),
        "gradients_differ_by": float(f"{max(differences):.2g}"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
