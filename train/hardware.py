"""Accelerators that plans are made for: their data sheets, the share of them that training reaches, and transfers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from .peak_flops import BFLOAT16

# For all accelerators: the share of the data sheet that large messages of NCCL reach inside a server and between
# servers, and that copies reach in memory; the share of a device that a collective takes from what runs beside it (20
# of 132 multiprocessors in the report of DeepSeek-V3); the time that it takes to start a collective, and that every
# further server of its ring adds ("latencies up to tens of microseconds", section 3.3.3). Usual values, none of them
# fitted.
LINK_SHARE = 0.75
NETWORK_SHARE = 0.8
MEMORY_SHARE = 0.8
COLLECTIVE_SHARE = 0.15
START_SECONDS = 10e-6
HOP_SECONDS = 5e-6

RESERVED_BYTES = 5 << 30
"""Memory of a device for the driver, the libraries' buffers and what the allocator cannot use."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device of a server.

    Args:
        peak_flops: dense bfloat16 operations a second, which utilisation is measured against.
        matmul, attention: shares of the peak that the matrix products of training and fused causal attention reach.
        memory_bytes, memory_bandwidth: and bytes a second.
        link: bytes a second each way to the other devices of the server.
        network: bytes a second each way between servers, of one device.
        per_server: devices.
    """

    peak_flops: float
    matmul: float
    attention: float
    memory_bytes: float
    memory_bandwidth: float
    link: float
    network: float
    per_server: int = 8


# Hopper: attention at 0.30 is FlashAttention-2 (35% forward, says the paper of FlashAttention-3); with more, the third
# row of the paper's table 4, which is mostly attention, would come out too fast. Products at 0.55 is then what is left
# for them in the first row (8,192 GPUs: 43%).
_H100 = Accelerator(
    peak_flops=BFLOAT16["H100"],
    matmul=0.55,
    attention=0.30,
    memory_bytes=80 << 30,
    memory_bandwidth=3.35e12,
    link=450e9,
    network=50e9,
)

# An assumption: the clock under load goes with the square root of the power, between linear (voltage fixed) and cubic.
_CAP = (500 / 700) ** 0.5

ACCELERATORS = {
    "h100": _H100,
    # torchtitan's: SXM with 96 GB of HBM2e, held to 500 of 700 W.
    "h100-500w": dataclasses.replace(
        _H100,
        matmul=_H100.matmul * _CAP,
        attention=_H100.attention * _CAP,
        memory_bytes=95 << 30,
        memory_bandwidth=2.4e12,
    ),
    "h200": dataclasses.replace(_H100, memory_bytes=141e9, memory_bandwidth=4.8e12),
    # Above torchtitan's 8B without a compiler on 64 of them (58%) by what compiling brought it on H100s, and
    # FlashAttention-2's paper (50-73%).
    "a100": Accelerator(
        peak_flops=BFLOAT16["A100"],
        matmul=0.70,
        attention=0.50,
        memory_bytes=80 << 30,
        memory_bandwidth=2.04e12,
        link=300e9,
        network=25e9,
    ),
}


def accelerator(name: str) -> Accelerator:
    """
    Raises:
        ValueError: no such accelerator.
    """
    if name not in ACCELERATORS:
        raise ValueError(f"hardware {name!r} is not known; there are {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


@dataclass(frozen=True)
class Transfer:
    """What moving data takes of one device: seconds, and bytes received from its server and from others."""

    seconds: float = 0.0
    server_bytes: float = 0.0
    network_bytes: float = 0.0

    def times(self, count: float) -> Transfer:
        return Transfer(self.seconds * count, self.server_bytes * count, self.network_bytes * count)


def together(transfers: Iterable[Transfer]) -> Transfer:
    """One after another."""
    listed = list(transfers)
    return Transfer(
        sum(t.seconds for t in listed), sum(t.server_bytes for t in listed), sum(t.network_bytes for t in listed)
    )


@dataclass(frozen=True)
class Group:
    """Devices that run collectives with each other.

    Args:
        size: how many.
        near: how many of them share a server; the others stand in servers with as many each.
    """

    size: int
    near: int


def gather(device: Accelerator, group: Group, size: float) -> Transfer:
    """All-gather or reduce-scatter of `size` bytes, those of the whole tensor, in a ring through all servers.

    Every server takes in what the others hold, over the network of all its members at once, and hands it round inside.
    """
    if group.size == 1:
        return Transfer()
    servers = group.size / group.near
    received = size * (1 - 1 / group.size)
    network = size * (1 - 1 / servers) / group.near
    inside = received - network
    seconds = max(inside / (device.link * LINK_SHARE), network / (device.network * NETWORK_SHARE))
    return Transfer(seconds + START_SECONDS + (servers - 1) * HOP_SECONDS, inside, network)


def send(device: Accelerator, near: bool, size: float) -> Transfer:
    """`size` bytes from one device to another, in the same server or not."""
    if near:
        return Transfer(size / (device.link * LINK_SHARE) + START_SECONDS, size, 0.0)
    return Transfer(size / (device.network * NETWORK_SHARE) + START_SECONDS + HOP_SECONDS, 0.0, size)
