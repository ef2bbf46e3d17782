"""What a profile says in short: the operators that took longest, and the time in communication."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import profile

ROWS = 20
# What the backends name their own work: gloo and mpi on the host, nccl by its kernels on the device.
ON_HOST = re.compile(r"^(gloo|mpi|ucc):")
ON_DEVICE = re.compile(r"nccl\w*kernel", re.IGNORECASE)
DISPATCH = re.compile(r"^(c10d|_c10d_functional|nccl)::?")

Interval = tuple[float, float]


@dataclass(frozen=True)
class Collective:
    """Operations of one name: how many, and the sum of their times from start to end, in seconds."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class TraceSummary:
    """One process.

    Attributes:
        seconds: that the trace covers.
        communicating: seconds during which a collective was under way, waiting for other processes included.
        exposed: those of them during which the process computed nothing.
        collectives: by name, the longest first.
        operators: a table of the operators.
    """

    seconds: float
    communicating: float
    exposed: float
    collectives: list[Collective]
    operators: str


def summarise(trace: profile, seconds: float) -> TraceSummary:
    """Of a trace that was stopped."""
    events: Any = trace.events()
    on_device = any(event.device_type != DeviceType.CPU for event in events)
    communication, computation = [], []
    names: dict[str, list[float]] = {}
    for event in events:
        interval = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        host = event.device_type == DeviceType.CPU
        carried = bool((ON_HOST if host else ON_DEVICE).search(event.name))
        if carried:
            communication.append(interval)
        elif host != on_device and _computes(event, host):
            computation.append(interval)
        if carried or (host and DISPATCH.match(event.name)):
            names.setdefault(event.name, []).append(interval[1] - interval[0])
    under_way = merged(communication)
    both = length(under_way) + length(merged(computation)) - length(merged([*under_way, *computation]))
    collectives = [Collective(name, len(times), sum(times)) for name, times in names.items()]
    averages = trace.key_averages()
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    return TraceSummary(
        seconds=seconds,
        communicating=length(under_way),
        exposed=length(under_way) - both,
        collectives=sorted(collectives, key=lambda one: -one.seconds),
        operators=averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=60),
    )


def as_text(title: str, ranks: Sequence[int], found: Sequence[TraceSummary]) -> str:
    """The table of a profile.

    Args:
        title: its first line.
        ranks: of the processes that were traced, found: what their traces say, at least one. Collectives and operators
            are shown of the first.
    """
    first = found[0]
    lines = [title, "", "Communication: a collective was under way, waiting for the other processes included."]
    shares = [one.communicating / one.seconds for one in found]
    for rank, one, share in zip(ranks, found, shares, strict=True):
        lines.append(
            f"  process {rank}: {one.communicating:.3f} s of {one.seconds:.3f} s ({share:.1%}), "
            f"{one.exposed:.3f} s of them without computing ({one.exposed / one.seconds:.1%})"
        )
    lines += ["", f"Collectives of process {ranks[0]}, each from its start to its end; they may run side by side."]
    lines += [f"  {'seconds':>10} {'calls':>8}  name"]
    lines += [f"  {one.seconds:>10.4f} {one.calls:>8,}  {one.name}" for one in first.collectives[:ROWS]]
    if not first.collectives:
        lines.append("  none")
    return "\n".join([*lines, "", f"Operators of process {ranks[0]}", first.operators])


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time as intervals that do not touch each other, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _computes(event: Any, host: bool) -> bool:
    # On the host ranges of any meaning nest; operators of torch itself never hold a wait for another process.
    if host:
        return event.name.startswith("aten::")
    return not event.is_user_annotation and not DISPATCH.match(event.name)
