"""RMSNorm, forward and backward, of `herdkit.text.rms_norm` and of torch, in turns on one thread; prints microseconds
of each and their ratio. `python benchmarks/rms_norm.py`
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from herdkit.text.rms_norm import rms_norm
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((24, 256, 128), (6, 200, 128), (6, 200, 4, 32), (4, 512, 2048))
ROUNDS, CALLS = 15, 20

Norm = Callable[[Tensor, Tensor], Tensor]


def of_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def microseconds(norm: Norm, x: Tensor, weight: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        torch.autograd.grad(norm(x, weight), (x, weight), gradient)
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'shape':>20} {'torch':>8} {'here':>8} {'ratio':>6}")
    for shape in SHAPES:
        x, weight = torch.randn(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
        gradient = torch.randn_like(x)
        norms: tuple[Norm, ...] = (of_torch, partial(rms_norm, eps=1e-5))
        rounds = [[microseconds(norm, x, weight, gradient) for norm in norms] for _ in range(ROUNDS)]
        torchs, here = (median(times) for times in zip(*rounds[2:], strict=True))
        print(f"{shape!s:>20} {torchs:8.0f} {here:8.0f} {torchs / here:6.2f}")


if __name__ == "__main__":
    main()
