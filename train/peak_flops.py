"""What a device can do at most, which model FLOPs utilisation (MFU) is a share of."""

from __future__ import annotations

import platform

import torch

# Vendors' figures without sparsity, bfloat16 with float32 accumulation; the longer of two names that fit counts.
BFLOAT16 = {
    "A100": 312e12,
    "H100": 989e12,  # SXM, the paper's
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(name: str, precision: str) -> float | None:
    """Floating-point operations a second of a device.

    Args:
        name: as `torch.cuda.get_device_name` says it ("NVIDIA H100 80GB HBM3").
        precision: see `TrainerConfig`.

    Returns:
        None where it is not known, as for every CPU and for float32.
    """
    words = name.replace("-", " ").split()
    known = [key for key in BFLOAT16 if set(key.split()) <= set(words)]
    return BFLOAT16[max(known, key=len)] if known and precision == "bfloat16" else None


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
