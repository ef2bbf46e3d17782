"""Forward and forward+backward of our vision transformer and of timm's and open_clip's of the same size, each with
random weights of its own, in turns in one process.

    OMP_PROC_BIND=true python benchmarks/vision_encoder.py [--threads 2] [--rounds 7] [--batch 8] [--size base]
    python benchmarks/vision_encoder.py --device cuda --size huge --batch 64       # H/14: images/s and MFU

Every figure is a median over rounds in which all take their turn; ratios (theirs / ours, above 1 where ours is
faster) are medians of the rounds' ratios. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from herdkit.vision import VisionConfig, VisionTransformer
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

SIZES = {
    # dim, layers, heads, patch, image
    "tiny": (192, 12, 3, 16, 224),
    "small": (384, 12, 6, 16, 224),
    "base": (768, 12, 12, 16, 224),
    "huge": (1280, 32, 16, 14, 224),
}
PEAK = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}
"""Dense bfloat16 operations per second of the data sheets."""


def models(size: str) -> dict[str, nn.Module]:
    dim, depth, heads, patch, image = SIZES[size]
    config = VisionConfig(
        image_size=image, patch_size=patch, dim=dim, n_layers=depth, n_heads=heads, ffn_dim=4 * dim, attention_bias=True
    )
    return {
        "here": VisionTransformer(config),
        "timm": TimmViT(img_size=image, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0),
        "open_clip": OpenClipViT(image, patch, dim, depth, heads, 4.0, output_dim=dim),
    }


def forward(name: str, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The pooled vector of every image: the state of the class token after the last norm."""
    if name == "here":
        one = torch.ones(len(pixels), dtype=torch.int64, device=pixels.device)
        return model.pooled(pixels[:, None], one, one[:, None].expand(-1, 2))
    return model(pixels)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = CLOCKS[clock]()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="under autocast; always on cuda")
    parser.add_argument("--clock", choices=CLOCKS, default=clock, help="cpu: beside other work (%(default)s)")
    options = parser.parse_args()
    clock = options.clock
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, mixed = options.device, options.bfloat16 or options.device == "cuda"
    ways = {name: model.to(device) for name, model in models(options.size).items()}
    image = SIZES[options.size][4]
    pixels = torch.randn(options.batch, 3, image, image, device=device)

    def inference(name: str) -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=mixed):
            forward(name, ways[name].eval(), pixels)

    def training(name: str) -> None:
        ways[name].train().zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = forward(name, ways[name], pixels).float().square().mean()
        loss.backward()

    result: dict = {
        "size": options.size,
        "batch": options.batch,
        "threads": options.threads,
        "clock": clock,
        "bfloat16": mixed,
    }
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    for what, step in (("forward", inference), ("forward_backward", training)):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for name in ways:
            step(name)
        for _ in range(options.rounds):
            for name in ways:
                times[name].append(seconds(lambda name=name, step=step: step(name), device))
        result[what] = {name: round(options.batch / median(own), 2) for name, own in times.items()}
        for name in ("timm", "open_clip"):
            ratios = [theirs / ours for theirs, ours in zip(times[name], times["here"], strict=True)]
            result[what][f"ratio_to_{name}"] = round(median(ratios), 3)
    if device == "cuda":
        peak = next((flops for name, flops in PEAK.items() if result["device"].startswith(name)), None)
        if peak is not None:
            rate = result["forward_backward"]["here"]
            result["mfu"] = round(3 * ways["here"].flops_per_image() * rate / peak, 3)
    result["unit"] = "images per second"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
