"""What `herdkit plan` says beside what others measured: tokens a second of a device, and memory.

    python benchmarks/published_speed.py

Figures of torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md
(plain tensor parallel) and docs/performance.md of August 2024; of OLMo-core: its README of November 2024, with the
micro-batches of its scripts and, since the number of GPUs is not said, 64. Runs in float8 are compared by memory alone,
which is much the same in bfloat16. Prints a table and one JSON line; "ratio" is the plan over the published figure.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from herdkit.text import TransformerConfig, preset
from herdkit.text.plan_layouts import cost
from herdkit.text.row_loader import PlannedPhase
from herdkit.train.hardware import accelerator
from herdkit.train.layout import ParallelConfig

SHARDS = {"shard": None, "reshard": True, "gather": "bfloat16"}
COMPILED = {**SHARDS, "compile": "inductor"}


def of_llama_2(dim: int, n_layers: int, n_heads: int, ffn_dim: int, vocab_size: int, kv: int = 0) -> TransformerConfig:
    return TransformerConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=kv or n_heads,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=4096,
    )


MODELS = {
    "8b": preset("8b"),
    "70b": preset("70b"),
    "405b": preset("405b"),
    "llama2-13b": of_llama_2(5120, 40, 40, 13_824, 32_000),
    "llama2-70b": of_llama_2(8192, 80, 64, 28_672, 32_000, kv=8),
    "olmo-7b": of_llama_2(4096, 32, 32, 11_008, 100_352),
    "olmo-13b": of_llama_2(5120, 40, 40, 13_824, 100_352),
}


@dataclass
class Run:
    """
    Args:
        source: whose.
        rows: of a micro-batch of each group of data parallel. micro_batches: of an update.
        layout: how processes share.
        speed: tokens a second of a device. memory: GiB.
        logit_bytes: that are held of each logit at once in the backward pass of a loss that has them all: what
            log_softmax gave and two gradients, in float32; one tensor more of torch's loss parallel.
    """

    source: str
    model: str
    hardware: str
    devices: int
    row_length: int
    rows: int
    layout: dict[str, Any]
    speed: float | None = None
    memory: float | None = None
    micro_batches: int = 1
    logit_bytes: int = 12


def selective(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**base, "recompute": "selective", **more}


def full(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**base, "recompute": "full", **more}


PIPE = {"tensor": 8, "pipeline": 8, "reshard": False}
"""Torch makes as many micro-batches as the pipeline is deep."""

RUNS = [
    Run("torchtitan", "8b", "h100-500w", 8, 8192, 2, selective(COMPILED), 6667, 77.0),
    Run("torchtitan", "8b", "h100-500w", 128, 8192, 2, selective(COMPILED), 6514, 62.0),
    Run("torchtitan", "8b", "h100-500w", 8, 8192, 2, selective(SHARDS), 5762, 82.4),
    Run("torchtitan", "8b", "h100-500w", 128, 8192, 2, selective(SHARDS), 5605, 67.0),
    Run("torchtitan", "8b", "h100-500w", 64, 8192, 12, selective(COMPILED, tensor=8), 4378),
    Run("torchtitan", "70b", "h100-500w", 256, 8192, 16, full(COMPILED, tensor=8), 597),
    Run("torchtitan, fp8", "70b", "h100-500w", 256, 8192, 16, full(COMPILED, tensor=8), None, 71.9, logit_bytes=16),
    Run("torchtitan", "405b", "h100-500w", 128, 8192, 2, full(COMPILED, tensor=8), 109),
    Run("torchtitan", "8b", "a100", 64, 8192, 1, selective(SHARDS), 2973),
    Run("torchtitan", "70b", "a100", 64, 8192, 1, full(SHARDS), 331),
    Run("torchtitan", "llama2-13b", "a100", 64, 4096, 2, SHARDS, 2162),
    Run("torchtitan", "llama2-13b", "a100", 64, 4096, 2, selective(SHARDS), 1904),
    Run("torchtitan", "llama2-70b", "a100", 64, 4096, 1, selective(SHARDS), 355),
    Run("torchtitan", "llama2-70b", "a100", 64, 4096, 2, full(SHARDS), 353),
    Run("OLMo-core", "olmo-7b", "h100", 64, 4096, 2, COMPILED, 10_000, micro_batches=8),
    Run("OLMo-core", "8b", "h100", 64, 4096, 2, COMPILED, 9500, micro_batches=8),
    Run("OLMo-core", "olmo-13b", "h100", 64, 4096, 1, COMPILED, 4600, micro_batches=32),
    Run("torchtitan, fp8", "405b", "h100-500w", 512, 8192, 4, full(COMPILED, **PIPE), None, 82.5, 8, 16),
    Run("torchtitan, fp8", "405b", "h100-500w", 512, 8192, 4,
        full(COMPILED, **PIPE, schedule="interleaved", chunks=2), None, 72.7, 8, 16),
    Run("torchtitan, fp8", "8b", "h100-500w", 8, 32_768, 1, full(COMPILED), None, 83.9),
    Run("torchtitan, fp8", "8b", "h100-500w", 8, 65_536, 1, full(COMPILED, context=2), None, 84.2),
    Run("torchtitan, fp8", "8b", "h100-500w", 8, 131_072, 1, full(COMPILED, context=4), None, 84.0),
    Run("torchtitan, fp8", "8b", "h100-500w", 8, 262_144, 1, full(COMPILED, context=8), None, 84.5),
]  # fmt: skip


def planned(run: Run) -> dict[str, float]:
    """The plan's speed, and its memory with the logits of all positions in place of those of a chunk, in GiB."""
    layout, config = ParallelConfig(**run.layout), MODELS[run.model]
    groups = run.devices // (layout.tensor * layout.context * layout.pipeline)
    phase = PlannedPhase(0, run.row_length, groups * run.rows * run.micro_batches, run.micro_batches, {})
    made = cost(config, phase, run.devices, accelerator(run.hardware), layout)
    logits = run.logit_bytes * run.rows * run.row_length / layout.context * config.vocab_size / layout.tensor
    memory = max(
        parts["total"] + (logits - parts["logits"] if parts["logits"] else 0) for parts in made["memory_bytes"].values()
    )
    return {"speed": made["tokens_per_second"], "memory": memory / 2**30}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = []
    print(f"{'':70}{'tokens/s':>9}{'planned':>9}{'ratio':>7}{'GiB':>9}{'planned':>9}{'ratio':>7}")
    for run in RUNS:
        plan, layout = planned(run), ParallelConfig(**run.layout)
        row = {name: value for name, value in asdict(run).items() if name not in plan}
        shown = ""
        for name, value in plan.items():
            published = getattr(run, name)
            if published is None:
                shown += " " * 25
                continue
            row[name] = {"published": published, "planned": round(value, 1), "ratio": round(value / published, 3)}
            shown += f"{published:>9,.5g}{value:>9,.5g}{value / published:>7.2f}"
        degrees = f"{run.devices} T{layout.tensor} C{layout.context} P{layout.pipeline}"
        made = f"{'eager' if layout.compile == 'none' else 'compiled'} {layout.recompute}"
        print(f"{run.source:16}{run.model:11}{run.hardware:10}{degrees:14}{made:19}{shown}")
        found.append(row)
    print(json.dumps({"benchmark": "published_speed", "runs": found}))


if __name__ == "__main__":
    main()
