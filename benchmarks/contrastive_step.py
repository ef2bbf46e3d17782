"""A contrastive training step on several processes, here and with open_clip's model and loss, the same sizes and
weights, in turns: forward, loss with gathered features, backward, gradients summed over processes, AdamW.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/contrastive_step.py [--rounds 7] [--batch 16] [--loss clip]

Ratios are theirs / ours, medians over rounds: above 1 where ours is faster. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import open_clip
import torch
import torch.distributed as dist
from herdkit.vision import ContrastiveModel, TextTower, TextTowerConfig, VisionConfig, VisionTransformer
from herdkit.vision.contrastive import clip_loss, siglip_loss
from herdkit.vision.interchange.open_clip import to_open_clip
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn

IMAGE, PATCH, DIM, LAYERS, HEADS = 96, 16, 256, 6, 4
LENGTH, VOCAB, EOS = 32, 4096, 4095


def models(loss: str) -> tuple[ContrastiveModel, nn.Module]:
    torch.manual_seed(0)
    vision = VisionConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        dim=DIM,
        n_layers=LAYERS,
        n_heads=HEADS,
        ffn_dim=4 * DIM,
        attention_bias=True,
    )
    text = TextTowerConfig(
        vocab_size=VOCAB, max_length=LENGTH, dim=DIM, n_layers=LAYERS, n_heads=HEADS, ffn_dim=4 * DIM
    )  # fmt: skip
    bias = -10.0 if loss == "siglip" else None
    ours = ContrastiveModel(VisionTransformer(vision), TextTower(text), DIM, 10.0, bias)
    sizes = {"width": DIM, "layers": LAYERS, "mlp_ratio": 4.0}
    theirs = open_clip.CLIP(
        DIM,
        {**sizes, "image_size": IMAGE, "patch_size": PATCH, "head_width": DIM // HEADS},
        {**sizes, "context_length": LENGTH, "vocab_size": VOCAB, "heads": HEADS, "pool_type": "eos", "eos_id": EOS},
        init_logit_bias=bias,
    )
    theirs.load_state_dict(to_open_clip(ours), strict=False)
    return ours, theirs


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> float:
    optimizer.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(part)
    optimizer.step()
    return value.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="of each process (%(default)s)")
    parser.add_argument("--loss", choices=("clip", "siglip"), default="clip")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world, n = dist.get_rank(), dist.get_world_size(), options.batch
    ours, theirs = models(options.loss)
    torch.manual_seed(rank)
    pixels = torch.randn(n, 3, IMAGE, IMAGE)
    tokens = torch.randint(1, VOCAB - 1, (n, LENGTH))
    tokens[:, -1] = EOS
    one = torch.ones(n, dtype=torch.int64)
    batch = {"tiles": pixels[:, None], "n_tiles": one, "grid": torch.ones(n, 2, dtype=torch.int64)}
    batch |= {"tokens": tokens, "lengths": torch.full((n,), LENGTH)}
    if options.loss == "clip":
        their_loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    else:
        their_loss = SigLipLoss(rank=rank, world_size=world)

    def loss_here() -> torch.Tensor:
        images, texts, scale = ours(batch)
        if options.loss == "clip":
            total, _, _ = clip_loss(images, texts, scale)
        else:
            total, _, _ = siglip_loss(images, texts, scale, ours.logit_bias)
        return total / (n * world)

    def loss_there() -> torch.Tensor:
        out = theirs(pixels, tokens)
        images, texts, scale = (out[k] if isinstance(out, dict) else out[i] for i, k in enumerate(KEYS))
        bias = [] if options.loss == "clip" else [theirs.logit_bias]
        return their_loss(images, texts, scale, *bias) / world

    ways = {
        "here": (ours, torch.optim.AdamW(ours.parameters(), lr=1e-4, fused=True), loss_here),
        "open_clip": (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True), loss_there),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, (model, optimizer, loss) in ways.items():
            dist.barrier()
            start = time.perf_counter()
            value = step(model, optimizer, loss)
            dist.barrier()
            if number:
                times[name].append(time.perf_counter() - start)
            else:
                losses[name] = value
    summed = torch.tensor([losses["here"], losses["open_clip"]])
    dist.all_reduce(summed)
    if rank == 0:
        pairs = zip(times["open_clip"], times["here"], strict=True)
        result = {
            "processes": world, "batch": n * world, "loss": options.loss,
            "first_loss": {"here": round(summed[0].item(), 4), "open_clip": round(summed[1].item(), 4)},
            "pairs_per_second": {name: round(n * world / median(own), 2) for name, own in times.items()},
            "ratio": round(median(a / b for a, b in pairs), 3),
        }  # fmt: skip
        print(json.dumps(result))
    dist.destroy_process_group()


KEYS = ("image_features", "text_features", "logit_scale")

if __name__ == "__main__":
    main()
