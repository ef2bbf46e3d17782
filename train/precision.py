"""What this machine's hardware computes fast."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def native_precision(device: torch.device) -> Precision:
    """bfloat16 where the device has units that multiply it, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and (cpu_has("avx512_bf16") or cpu_has("amx_bf16"))
    return "bfloat16" if native else "float32"


@torch.compiler.assume_constant_result  # torch.compile cannot trace how torch asks the CPU
def cpu_has(unit: str) -> bool:
    """Whether the CPU has a unit of `torch.cpu.get_capabilities`."""
    return bool(torch.cpu.get_capabilities().get(unit))


def cpu_name() -> str:
    """Maker and model, such as "AMD EPYC"; empty where it is not known."""
    return str(torch.cpu.get_capabilities().get("cpu_name", ""))
