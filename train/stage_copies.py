"""Parameters that several processes of a pipeline have under one name: the encoder that every stage runs for itself
(section 7.3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import torch.distributed as dist
from torch import Tensor

from . import parallel
from .place import Place


class StageCopies:
    """Keeps copies alike: what each process found out about one is summed. All processes make it at the same time.

    Args:
        names: of the parameters that this process has.

    Attributes:
        elsewhere: those of them that count for an earlier process of the pipeline.
    """

    def __init__(self, names: Iterable[str], place: Place):
        self.elsewhere: set[str] = set()
        self._holders: dict[str, tuple[int, ...]] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if place.layout.pipeline == 1:
            return
        named = [set(own) for own in parallel.gather(list(names), place.group("pipeline"))]
        for name in sorted(named[place.at.pipeline]):
            holders = tuple(at for at, own in enumerate(named) if name in own)
            if len(holders) > 1:
                self._holders[name] = holders
                if holders[0] != place.at.pipeline:
                    self.elsewhere.add(name)
        pipeline = place.layout.peers(parallel.rank(), "pipeline")
        for holders in sorted(set(self._holders.values())):
            ranks = [pipeline[at] for at in holders]
            group = dist.new_group(ranks, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._groups[holders] = group

    def number(self, name: str) -> int:
        """How many processes of the pipeline have this parameter."""
        return len(self._holders.get(name, (0,)))

    def sum_gradients(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Adds up the gradients of copies, in place. Every process of the pipeline calls it."""
        of_group: Mapping[tuple[int, ...], list[Tensor]] = {holders: [] for holders in self._groups}
        for name, parameter in sorted(parameters, key=itemgetter(0)):
            if name in self._holders:
                of_group[self._holders[name]].append(parameter)
        for holders, copies in of_group.items():
            parallel.sum_gradients(copies, self._groups[holders])
