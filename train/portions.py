"""Tensors that processes share: what one process keeps of each, and each of them whole, one at a time, for files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import parallel
from .place import Place

Region = tuple[slice, ...]
Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""


class Portion(NamedTuple):
    """What a process keeps of a tensor: `tensor`, in the memory of the model, is `whole[region]`."""

    tensor: Tensor
    region: Region


def portions(tensors: Mapping[str, Tensor]) -> dict[str, Portion]:
    """What this process keeps of each tensor, by name; of one that is no `DTensor`, everything."""
    return {name: Portion(parallel.local(tensor.detach()), _region(tensor)) for name, tensor in tensors.items()}


def _region(tensor: Tensor) -> Region:
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


class Source(Protocol):
    """Where tensors come from."""

    def read(self, into: Mapping[str, Portion]) -> None:
        """Fills what this process keeps of some of them, by name."""
        ...


@dataclass(frozen=True)
class HeldTensors:
    """Those that this process has in memory, whole, by name."""

    tensors: Mapping[str, Tensor]

    def read(self, into: Mapping[str, Portion]) -> None:
        for name, portion in into.items():
            portion.tensor.copy_(self.tensors[name].detach()[portion.region])


@dataclass(frozen=True)
class PartOf:
    """The tensors of a part of a model: those whose names begin with `prefix`, which the part leaves out."""

    source: Source
    prefix: str

    def read(self, into: Mapping[str, Portion]) -> None:
        self.source.read({self.prefix + name: portion for name, portion in into.items()})


class WholeTensors:
    """Tensors for files; those of this process alone, which writes all of the files.

    Args:
        tensors: by name, in the order that they are to have.

    Attributes:
        kinds: shape and dtype of each, by name, in that order.
    """

    shared = False

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.kinds: dict[str, Kind] = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self._own = {name: tensor.detach() for name, tensor in tensors.items()}

    def writes(self, names: Sequence[str]) -> bool:
        """Whether it is this process that writes a file of these tensors."""
        return True

    def of_file(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of a file, in the process that writes it; in the others nothing. All processes go
        through it to its end, for the same files in the same order."""
        for name in names:
            yield name, self._own[name]


class SharedTensors(WholeTensors):
    """Those of all processes of a layout. A file is written by the first process of the pipeline's stage that has the
    first of its tensors, so that stages write files of their own at the same time. All processes make it together.

    Args:
        tensors: of which this process keeps a portion, by name.
        place: this process's.
        names: of all stages' tensors, in the order that they are to have.
    """

    shared = True

    def __init__(self, tensors: Mapping[str, Tensor], place: Place, names: Iterable[str]):
        super().__init__(tensors)
        self.place = place
        self._stage: dict[str, int] = {}
        kinds: dict[str, Kind] = {}
        for stage, found in enumerate(parallel.gather(self.kinds, place.group("pipeline"))):
            for name in found.keys() - kinds.keys():  # of copies, the first
                self._stage[name] = 0 if place.layout.pipeline == 1 else stage
            kinds |= found
        self.kinds = {name: kinds[name] for name in names}

    def writes(self, names: Sequence[str]) -> bool:
        return self._first_of_stage() and self.place.at.pipeline == self._stage[names[0]]

    def of_file(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        if self.place.at.replicate > 0:  # the others can do without
            return
        at, group, writer = self.place.at.pipeline, self.place.group("pipeline"), self._stage[names[0]]
        for name in names:
            stage, tensor = self._stage[name], None
            if at == stage:
                tensor = parallel.whole(self._own[name])
            if not self._first_of_stage():
                continue
            if at == writer != stage:
                shape, dtype = self.kinds[name]
                tensor = torch.empty(shape, dtype=dtype, device=parallel.device())
                dist.recv(tensor, group=group, group_src=stage)
            elif at == stage != writer:
                assert tensor is not None
                dist.send(tensor.contiguous(), group=group, group_dst=writer)
            if at == writer:
                assert tensor is not None
                yield name, tensor

    def _first_of_stage(self) -> bool:
        at = self.place.at
        return at.tensor == at.context == at.shard == at.replicate == 0
