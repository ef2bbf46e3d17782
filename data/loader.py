"""Batches in an order that is a pure function of (seed, position), so that a run can be resumed anywhere.

The global order is one sequence of positions. Batch s of rank r takes the positions

    start + s * batch_size * world_size + r * batch_size   and the following batch_size - 1,

where `start` is how many samples a run had consumed before: the union over the ranks is the global order, and
the state is that one number, whatever the number of ranks, workers or prefetched batches.

Where the sources are limited, the order ends. The last step shares out what is left as evenly as it can be, so that
every sample comes once and all ranks end at the same step: a rank may get a smaller batch there, or None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

from .mixture import Mixture
from .steps import Batch, Begin, Collate, LoaderOptions, Step, StepLoader


class Loader(StepLoader[Batch]):
    """Batches of a mixture, prepared in the background.

    Args:
        mixture, collate, options: as in `StepLoader`.
        batch_size: samples of this rank's batch.
        drop_last: leaves out a last step that would not give every rank a whole batch.
    """

    def __init__(
        self,
        mixture: Mixture,
        collate: Collate[Batch],
        batch_size: int,
        *,
        drop_last: bool = False,
        **options: Unpack[LoaderOptions],
    ):
        super().__init__(mixture, collate, **options)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.batch_size, self.drop_last = batch_size, drop_last
        self.place = {"consumed": 0}

    def steps(self, begin: Begin) -> Iterator[Step]:
        start, end = self.consumed, self.mixture.end
        while end is None or start < end:
            count = self.batch_size * self.world_size
            if end is not None and start + count > end:
                if self.drop_last:
                    return
                count = end - start
            mine, following = (start + count * rank // self.world_size for rank in (self.rank, self.rank + 1))
            start += count
            yield Step(range(mine, following), {"consumed": start})
