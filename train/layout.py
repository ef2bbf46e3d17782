"""Layouts: how processes share a model and a batch (section 3.3.2 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from .config import load_recipe, read_overrides

DIMENSIONS = ("tensor", "context", "pipeline", "shard", "replicate")
"""From the inside out: neighbours in rank share a tensor."""


class LayoutError(ValueError):
    """A layout that cannot be; `key` is the field of `ParallelConfig` to change."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"parallel.{key}: {problem}")
        self.key = key


@dataclass(kw_only=True)
class ParallelConfig:
    """How many processes share what. Those that are left over after `shard` hold replicas (HSDP).

    Args:
        tensor: share every matrix and the positions between them (tensor and sequence parallel).
        context: share a row: 2 x context chunks, of which a process has one from either end; keys and values are
            gathered.
        pipeline: share the layers.
        shard: share the storage of weights, gradients and optimizer state (FSDP) and each take rows of their own.
            The processes of `context` share the storage as well. None: all that are left.
        reshard: drop gathered weights after the forward pass, to gather them again for the backward pass. The paper
            keeps them.
        schedule: of the pipeline. "interleaved" has several stages on a process.
        chunks: stages on a process, V in the paper.
        consecutive: micro-batches that a stage of the interleaved schedule takes in a row, N in the paper. None: as
            many as `pipeline`.
        recompute: what the backward pass makes again. "selective": all but the outputs of attention and of every
            second matrix product of a layer (torchtitan's "op"); "full": all but the input of a layer. The paper: none.
        compile: torch.compile of every layer: "inductor" takes a minute or two before the first update and makes the
            others faster; "aot_eager", for tests, makes nothing faster.
        gather: precision in which weights that are stored in shards are gathered. "bfloat16", as in the paper, goes
            with `trainer.precision` bfloat16: half the traffic, and the residual stream is bfloat16 as well. What is
            stored and how gradients are summed stays float32. Without shards there is nothing to gather.
        float8: matrix products of the layers, but the first and the last (as in section 6.2), in 8 bits, through
            torchao, on a GPU that has them: scales of whole tensors or of their rows. "emulated" is "tensorwise" in
            slow arithmetic, for tests on any device.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    shard: int | None = 1
    reshard: bool = False
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    chunks: int = 1
    consecutive: int | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    gather: Literal["float32", "bfloat16"] = "float32"
    float8: Literal["none", "tensorwise", "rowwise", "emulated"] = "none"

    def __post_init__(self) -> None:
        for name in ("tensor", "context", "pipeline", "shard", "chunks", "consecutive"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if (self.schedule == "interleaved") != (self.chunks > 1):
            raise ValueError(
                f"chunks must be 2 or more for schedule 'interleaved' and 1 for the others, not {self.chunks} for "
                f"{self.schedule!r}"
            )
        if self.pipeline == 1 and self.schedule != "1f1b":
            raise ValueError(f"schedule {self.schedule!r} needs pipeline of 2 or more, not 1")
        if self.consecutive is not None and self.schedule != "interleaved":
            raise ValueError(f"consecutive is of schedule 'interleaved', not of {self.schedule!r}; leave it out")


@dataclass(kw_only=True)
class _ParallelFile:
    parallel: ParallelConfig


def read_parallel(text: str) -> ParallelConfig:
    """From "tensor=8 pipeline=16", or from a YAML file with a block `parallel`.

    Raises:
        RecipeError: a key or value that does not fit, or no such file.
    """
    if "=" in text:
        return read_overrides(ParallelConfig, text.split())
    return load_recipe(Path(text), _ParallelFile).parallel


class Coordinates(NamedTuple):
    """Where a process stands along each dimension."""

    tensor: int
    context: int
    pipeline: int
    shard: int
    replicate: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The degrees of all dimensions, for a given number of processes; see `lay_out`."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    shard: int = 1
    replicate: int = 1

    @property
    def degrees(self) -> tuple[int, ...]:
        return self.tensor, self.context, self.pipeline, self.shard, self.replicate

    @property
    def processes(self) -> int:
        return math.prod(self.degrees)

    @property
    def data(self) -> int:
        """Groups of processes that take rows of their own."""
        return self.shard * self.replicate

    @property
    def storage(self) -> int:
        """Processes over which one weight is sharded, besides `tensor`."""
        return self.context * self.shard

    def coordinates(self, rank: int) -> Coordinates:
        """rank = tensor + T * (context + C * (pipeline + P * (shard + S * replicate)))."""
        found = []
        for degree in self.degrees:
            rank, at = divmod(rank, degree)
            found.append(at)
        return Coordinates(*found)

    def peers(self, rank: int, *dimensions: str) -> list[int]:
        """The ranks that differ from `rank` in these dimensions alone, itself included, in ascending order."""
        here = self.coordinates(rank)
        ranks, stride = [0], 1
        for name, degree, at in zip(DIMENSIONS, self.degrees, here, strict=True):
            steps = range(degree) if name in dimensions else (at,)
            ranks = [inner + stride * step for step in steps for inner in ranks]
            stride *= degree
        return ranks

    def neighbours(self, per_server: int, *dimensions: str) -> int:
        """How many of the peers of rank 0 along these dimensions stand in its server, itself included."""
        return _neighbours(self, per_server, dimensions)


@lru_cache(maxsize=4096)
def _neighbours(layout: Layout, per_server: int, dimensions: tuple[str, ...]) -> int:
    others = [i for i, name in enumerate(DIMENSIONS) if name not in dimensions]
    near = (layout.coordinates(rank) for rank in range(min(per_server, layout.processes)))
    return sum(not any(place[i] for i in others) for place in near)


def lay_out(parallel: ParallelConfig, processes: int) -> Layout:
    """
    Raises:
        LayoutError: the degrees do not divide the processes, or nothing is there to gather.
    """
    model = parallel.tensor * parallel.context * parallel.pipeline
    product = f"tensor x context x pipeline = {parallel.tensor} x {parallel.context} x {parallel.pipeline} = {model}"
    if processes % model:
        raise LayoutError("tensor", f"{processes} processes are not a multiple of {product}")
    left = processes // model
    shard = left if parallel.shard is None else parallel.shard
    if left % shard:
        raise LayoutError("shard", f"{processes} processes / ({product}) leave {left}, not a multiple of {shard}")
    if parallel.gather != "float32" and parallel.shard is not None and parallel.context * shard == 1:
        found = f"{parallel.gather!r}, but nothing is stored in shards: context x shard = 1 x 1"
        raise LayoutError("gather", f"{found}; set parallel.gather to float32")
    return Layout(
        tensor=parallel.tensor,
        context=parallel.context,
        pipeline=parallel.pipeline,
        shard=shard,
        replicate=left // shard,
    )


def bubble(parallel: ParallelConfig, micro_batches: int) -> float:
    """Idle time of the pipeline over working time: (P - 1) / (V M)."""
    return (parallel.pipeline - 1) / (parallel.chunks * micro_batches)


def run_length(parallel: ParallelConfig, micro_batches: int) -> int:
    """Micro-batches that a stage takes in a row, at most: N of the interleaved schedule, else as the schedule has it.
    Where N does not divide them, the runs are a little longer and as equal as can be: after one shorter than the
    pipeline, processes would wait for each other for ever.

    Raises:
        LayoutError: so few that the first process would wait for the last within every round.
    """
    if parallel.schedule == "gpipe":
        return micro_batches
    if parallel.schedule == "1f1b":
        return min(parallel.pipeline, micro_batches)
    least = min(parallel.pipeline, micro_batches)
    run = min(parallel.consecutive or parallel.pipeline, micro_batches)
    if run < least:
        raise LayoutError(
            "consecutive",
            f"{run} is below min(pipeline, micro-batches) = min({parallel.pipeline}, {micro_batches}) = {least}: the "
            "first process would wait for the last in every round",
        )
    return math.ceil(micro_batches / (micro_batches // run))


def passes_in_flight(parallel: ParallelConfig, process: int, micro_batches: int) -> int:
    """Forward passes, each of one stage over one micro-batch, that a process of the pipeline holds at most."""
    after = parallel.pipeline - process - 1
    if parallel.schedule == "gpipe":
        return micro_batches
    if parallel.schedule == "1f1b":
        return min(micro_batches, after + 1)
    warm_up = 2 * after + (parallel.chunks - 1) * run_length(parallel, micro_batches)
    return min(parallel.chunks * micro_batches, warm_up + 1)
