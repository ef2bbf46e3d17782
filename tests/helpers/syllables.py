"""Recordings of syllables that are no words."""

import torch

RATE = 16_000


def syllables(seconds: float, seed: int = 0) -> torch.Tensor:
    """Bursts of harmonics, five a second, as loud and as uneven as speech."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * RATE)) / RATE
    pitch = 110 + 60 * torch.rand(1, generator=generator)
    voice = sum(torch.sin(2 * torch.pi * k * pitch * time) / k for k in range(1, 25))
    envelope = torch.sin(torch.pi * 5 * time).square() + 0.02
    noise = torch.randn(len(time), generator=generator)
    return 0.1 * envelope * voice + 1e-4 * noise


def pause(seconds: float) -> torch.Tensor:
    return 1e-4 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(9))
