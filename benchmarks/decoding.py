"""Prefill and greedy decoding of a 100M Llama, here and in transformers `generate`, the same float32 weights, in turns
in one process; batch 1, 16 ragged prompts, int8 weights, speculation, and with --compile a compiled step.

    OMP_PROC_BIND=true python benchmarks/decoding.py [--threads 2] [--rounds 5] [--compile]

Every figure is a median over rounds in which all ways take their turn; ratios are medians of the rounds' ratios. The
time of decoding is that of a call with many tokens less that of a call with one, which is the prefill. The last line is
one JSON object.

Speculation has a made draft: the target's layers but the first two are scaled down to a small correction, and the
draft is the target without them, in int8. So it is right nearly always, as a good trained draft is; the share of its
proposals that stood is printed. How good a draft can be had for a real model is not what this measures.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from herdkit.text import SamplingOptions, Speculation, Transformer, TransformerConfig, generate, to_hf_state_dict
from herdkit.text.compiled import compile_step
from herdkit.text.quantisation import quantise
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 2048, "vocab_size": 32_000}
DRAFT_LAYERS, CORRECTION = 2, 0.01
Generate = Callable[[int], list[list[int]]]


def ours(model: Transformer, prompts: Sequence[Sequence[int]], **way) -> Generate:
    def run(new: int) -> list[list[int]]:
        return [row.tokens for row in generate(model, prompts, SamplingOptions(max_new_tokens=new), **way)]

    return run


def theirs(model: Transformer, prompts: Sequence[Sequence[int]]) -> Generate:
    config = LlamaConfig(
        hidden_size=CONFIG["dim"], num_hidden_layers=CONFIG["n_layers"], num_attention_heads=CONFIG["n_heads"],
        num_key_value_heads=CONFIG["n_kv_heads"], intermediate_size=CONFIG["ffn_dim"], vocab_size=CONFIG["vocab_size"],
        rms_norm_eps=1e-5, max_position_embeddings=4096, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    hf.load_state_dict(to_hf_state_dict(model.config, model.state_dict()), strict=False)
    hf.tie_weights()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    @torch.inference_mode()
    def run(new: int) -> list[list[int]]:
        out = hf.generate(tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return out[:, longest:].tolist()

    return run


def seconds(run: Generate, new: int) -> float:
    start = time.perf_counter()
    run(new)
    return time.perf_counter() - start


def compare(ways: dict[str, Generate], new: int, rounds: int, tokens: int, rows: int) -> dict:
    """Tokens per second and ratios to the first way, of the prefill of `tokens` tokens and of decoding."""
    for run in ways.values():
        run(4)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            prefill = seconds(run, 1)
            times[name].append((prefill, max(seconds(run, 1 + new) - prefill, 1e-9)))
    base = next(iter(times.values()))
    return {
        name: {
            "prefill_per_second": round(tokens / median(p for p, _ in own), 1),
            "prefill_ratio": round(median(b[0] / o[0] for b, o in zip(base, own, strict=True)), 3),
            "decode_per_second": round(rows * new / median(d for _, d in own), 1),
            "decode_ratio": round(median(b[1] / o[1] for b, o in zip(base, own, strict=True)), 3),
        }
        for name, own in times.items()
    }


def bandwidth() -> float:
    """Bytes per second of reading a tensor larger than the caches; the fastest of some tries."""
    big = torch.ones(100_000_000)
    return 4 * len(big) / min(seconds(lambda _: big.sum().tolist(), 0) for _ in range(7))


def good_draft(model: Transformer) -> tuple[Transformer, Transformer]:
    """A target and a draft made as the head of this file says."""
    target = copy.deepcopy(model)
    with torch.no_grad():
        for layer in target.layers[DRAFT_LAYERS:]:
            layer.attention.wo.weight *= CORRECTION
            layer.feed_forward.w2.weight *= CORRECTION
    draft = copy.deepcopy(target)
    draft.layers = draft.layers[:DRAFT_LAYERS]
    draft.config = TransformerConfig(**{**CONFIG, "n_layers": DRAFT_LAYERS}, max_seq_len=4096, tie_embeddings=True)
    return target, quantise(draft)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="takes a minute or two more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**CONFIG, max_seq_len=4096, tie_embeddings=True)).eval()
    with torch.no_grad():
        # The embedding is the output projection too, and would make every token predict itself.
        for layer in model.layers:
            layer.feed_forward.w2.weight *= 8
    small = quantise(copy.deepcopy(model))

    one = [torch.randint(1, CONFIG["vocab_size"], (512,)).tolist()]
    many = [torch.randint(1, CONFIG["vocab_size"], (64 + 12 * i,)).tolist() for i in range(16)]
    result: dict = {"cpu": cpu(), "threads": options.threads, "torch": torch.__version__}
    ways = {"transformers": theirs(model, one), "here": ours(model, one), "int8": ours(small, one)}
    if options.compile:
        ways["compiled"] = ours(model, one, step=compile_step(model))
        ways["int8_compiled"] = ours(small, one, step=compile_step(small))
    result["same_tokens"] = ways["transformers"](16) == ways["here"](16)
    result["batch_1"] = compare(ways, 24, options.rounds, 512, 1)
    ways = {"transformers": theirs(model, many), "here": ours(model, many), "int8": ours(small, many)}
    if options.compile:
        ways["compiled"] = ours(model, many, step=compile_step(model, freeze=True))
    result["batch_16_ragged"] = compare(ways, 12, options.rounds, sum(map(len, many)), 16)

    speed = bandwidth()
    read = 4 * (sum(p.numel() for p in model.layers.parameters()) + model.tok_embeddings.weight.numel())
    limit = speed / read
    result["bandwidth"] = {
        "gigabytes_per_second": round(speed / 1e9, 2),
        "float32_tokens_per_second": round(limit, 1),
        "share_here": round(result["batch_1"]["here"]["decode_per_second"] / limit, 3),
        "share_transformers": round(result["batch_1"]["transformers"]["decode_per_second"] / limit, 3),
    }

    target, draft = good_draft(model)
    rounds_of = count_rounds(target)
    speculation = Speculation(draft=draft, length=5)
    ways = {"plain": ours(target, one), "speculative": ours(target, one, speculation=speculation)}
    result["speculation"] = compare(ways, 48, options.rounds, 512, 1)
    result["speculation"]["same_tokens"] = ways["plain"](48) == ways["speculative"](48)
    rounds_of.clear()
    ways["speculative"](49)
    judgements = sum(width == speculation.length + 1 for width in rounds_of)
    result["speculation"]["proposals_that_stood"] = round((48 / judgements - 1) / speculation.length, 3)
    print(json.dumps(result))


def count_rounds(model: Transformer) -> list[int]:
    """A list to which every pass of the model adds its width."""
    widths: list[int] = []
    model.norm.register_forward_hook(lambda _, arguments, __: widths.append(arguments[0].shape[1]))
    return widths


if __name__ == "__main__":
    main()
