"""Forward and backward of a language model of 100M parameters, here and in transformers, in turns on the same threads.

    python benchmarks/text_training.py [--precision bfloat16] [--compile] [--batch 8] [--length 512]
    python benchmarks/text_training.py --memory --vocabulary 128256

Both train on the same rows: transformers with `labels`, here with the objective of the training stages. Beside them run
the matrix products of such a step alone: what no implementation on the same kernels can go below; `limit` is the ratio
that it would have. With --compile both are compiled, and transformers is run as it comes, too: `ratio_to_eager`. Prints
the medians of interleaved rounds as one JSON line; with --memory the growth of the peak of resident memory in a process
of its own for each.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from herdkit.text import Transformer, TransformerConfig, config_to_hf, to_hf_state_dict
from herdkit.text.linear import product
from herdkit.text.loss import CHUNK_BYTES
from herdkit.text.objective import next_token
from herdkit.text.rows import IGNORE, TokenBatch

Step = Callable[[], float]


def sizes(vocabulary: int, length: int) -> TransformerConfig:
    return TransformerConfig(
        dim=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=4,
        ffn_dim=2048,
        vocab_size=vocabulary,
        max_seq_len=length,
        tie_embeddings=True,
    )


def ours(options: argparse.Namespace, tokens: torch.Tensor, model: Transformer | None = None) -> Step:
    model = model or Transformer(sizes(options.vocabulary, options.length))
    if options.compile:
        for layer in model.layers:
            layer.compile()
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
    batch = TokenBatch(tokens, labels)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss, count, _ = next_token(model, batch)
        (loss / count).backward()
        return (loss / count).item()

    return step


def products(options: argparse.Namespace) -> Step:
    """The products of one step with the weights, their two gradients each; attention's own are left out."""
    config = sizes(options.vocabulary, options.length)
    dtype = getattr(torch, options.precision)
    tokens, kv = options.batch * options.length, config.n_kv_heads * config.head_dim
    layer = [(config.dim, config.dim)] * 2 + [(config.dim, kv)] * 2 + [(config.dim, config.ffn_dim)] * 3
    chunk = CHUNK_BYTES // (4 * options.vocabulary)  # of positions, as the loss takes them

    def of(rows: int, inputs: int, outputs: int) -> Callable[[], None]:
        x, w, g = (torch.randn(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        of_w = torch.empty_like(w)

        def run() -> None:
            product(x, w)
            product(g, w.t())
            torch.mm(g.t(), x, out=of_w)

        return run

    made = {shape: of(tokens, *shape) for shape in set(layer)}
    rows = [len(part) for part in torch.arange(tokens).split(chunk)]
    ends = {n: of(n, config.dim, options.vocabulary) for n in set(rows)}

    def step() -> float:
        for _ in range(config.n_layers):
            for shape in layer:
                made[shape]()
        for n in rows:
            ends[n]()
        return 0.0

    return step


def theirs(
    options: argparse.Namespace, tokens: torch.Tensor, weights: Transformer | None = None, *, compiled: bool = False
) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = sizes(options.vocabulary, options.length)
    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(config)))
    if weights is not None:
        model.load_state_dict(to_hf_state_dict(config, weights.state_dict()), strict=False)
        model.tie_weights()
    if compiled:
        model.model.compile()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item()

    return step


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def growth(which: str, options: argparse.Namespace, tokens: torch.Tensor) -> int:
    step = ours(options, tokens) if which == "herdkit" else theirs(options, tokens, compiled=options.compile)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--grow", choices=["herdkit", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens = torch.randint(options.vocabulary, (options.batch, options.length))
    if options.grow:
        print(growth(options.grow, options, tokens))
        return
    setting = {name: getattr(options, name) for name in ("precision", "compile", "batch", "length", "vocabulary")}
    result: dict = {"benchmark": "text_training", **setting, "threads": torch.get_num_threads()}
    result |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    if options.memory:
        for name in ("herdkit", "transformers"):
            command = [sys.executable, __file__, *sys.argv[1:], "--grow", name]
            result[f"{name}_bytes"] = int(subprocess.run(command, check=True, capture_output=True).stdout)
        result["ratio"] = result["herdkit_bytes"] / result["transformers_bytes"]
    else:
        model = Transformer(sizes(options.vocabulary, options.length))
        steps = {"transformers": theirs(options, tokens, model, compiled=options.compile)}
        steps["herdkit"] = ours(options, tokens, model)
        if options.compile:
            steps["eager_transformers"] = theirs(options, tokens, model)
        losses = {name: step() for name, step in steps.items()}  # warms up, and shows that both do the same
        steps["products"] = products(options)
        times = [{name: seconds(step) for name, step in steps.items()} for _ in range(options.rounds)]
        for name in steps:
            result[f"{name}_tokens_per_second"] = round(tokens.numel() / median(row[name] for row in times), 1)
        for name, other in (("ratio", "herdkit"), ("limit", "products")):
            result[name] = round(median(row["transformers"] / row[other] for row in times), 3)
        if options.compile:
            result["ratio_to_eager"] = round(median(row["eager_transformers"] / row["herdkit"] for row in times), 3)
        result["losses"] = losses
    print(json.dumps(result))


if __name__ == "__main__":
    main()
