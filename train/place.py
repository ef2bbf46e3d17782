"""The place of a process in a layout, and the device mesh that the processes form."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import parallel
from .layout import Coordinates, Layout, LayoutError, ParallelConfig, lay_out

Dimension = Literal["tensor", "context", "pipeline", "replicate", "data", "positions", "row"]


class Place:
    """Where this process stands. All processes make it at the same time.

    Args:
        parallel_config: what the processes share.

    Raises:
        LayoutError: it does not divide the processes.

    Attributes:
        layout: the degrees of all dimensions.
        at: this process's coordinates.
    """

    def __init__(self, parallel_config: ParallelConfig | None = None):
        self.config = parallel_config or ParallelConfig()
        self.layout: Layout = lay_out(self.config, parallel.world_size())
        self.at: Coordinates = self.layout.coordinates(parallel.rank())
        self._mesh: DeviceMesh | None = None
        if self.layout.processes > self.layout.replicate:
            self._mesh, self._rows = _make_meshes(self.layout)
            flat = {"data": ("replicate", "storage"), "positions": ("replicate", "storage", "tensor")}
            self._flat = {name: self._mesh[dimensions]._flatten(name) for name, dimensions in flat.items()}
            self._flat["row"] = self._rows["context", "tensor"]._flatten("row")

    @property
    def data(self) -> int:
        """Which of the `layout.data` groups that take rows of their own this process belongs to."""
        return self.at.shard + self.layout.shard * self.at.replicate

    @property
    def replicas_alone(self) -> bool:
        """Whether every process has the whole model and rows of its own."""
        return self._mesh is None

    @property
    def counts(self) -> bool:
        """Whether what this process found out about a batch counts: the processes of `tensor` all find the same."""
        return self.at.tensor == 0

    @property
    def random_stream(self) -> int:
        """Processes of one `tensor` group draw the same random numbers, all others their own."""
        return parallel.rank() // self.layout.tensor

    @property
    def tensor(self) -> DeviceMesh:
        """The mesh over which matrices are divided; only where the layout is more than replicas."""
        assert self._mesh is not None
        return self._mesh["tensor"]

    @property
    def storage(self) -> DeviceMesh | None:
        """The mesh over which weights are stored in shards: of one dimension, or, with replicas, of two (HSDP); None
        where each process stores whole ones."""
        if self._mesh is None or self.layout.storage == 1:
            return None
        return self._mesh["replicate", "storage"] if self.layout.replicate > 1 else self._mesh["storage"]

    def require_storage_alone(self, what: str) -> None:
        """
        Raises:
            LayoutError: the layout shares more than the storage of weights; `what` can do no more.
        """
        for dimension in ("tensor", "context", "pipeline"):
            if getattr(self.layout, dimension) > 1:
                raise LayoutError(dimension, f"{what} shares the storage of weights alone: use parallel.shard")

    def group(self, dimension: Dimension) -> dist.ProcessGroup | None:
        """The processes along one dimension; None, for all there are, where they are replicas of each other alone.

        "data" is all that have rows or chunks of rows of their own: replicas, and those that share storage. "positions"
        is these and `tensor`, between which positions are divided where matrices are not. "row" is those that share
        rows: `context` and `tensor`.
        """
        if self._mesh is None:
            return None
        if dimension in self._flat:
            return self._flat[dimension].get_group()
        return self._rows.get_group("context") if dimension == "context" else self._mesh.get_group(dimension)


def _make_meshes(layout: Layout) -> tuple[DeviceMesh, DeviceMesh]:
    """The processes by pipeline, replicate, storage and tensor, and those that share rows by context and tensor.
    Ranks are those of `Layout.coordinates`."""
    device, ranks = parallel.device().type, torch.arange(layout.processes).view(tuple(reversed(layout.degrees)))
    replicate, shard, pipeline, context, tensor = range(5)
    stored = ranks.permute(pipeline, replicate, shard, context, tensor).flatten(2, 3)
    rows = ranks.flatten(0, 2)
    return (
        DeviceMesh(device, stored, mesh_dim_names=("pipeline", "replicate", "storage", "tensor")),
        DeviceMesh(device, rows, mesh_dim_names=("others", "context", "tensor")),
    )
