"""Shards for any PyTorch program: a dataset that knows its rank and its place, and worker processes that keep both.

dataset = ShardDataset("shards/train-{000000..000999}.tar", 64, transform=decode)
loader = ShardLoader(dataset, num_workers=4)
for epoch in range(10):
    for images, captions in loader:
        ...
        state = loader.state_dict()  # plain JSON; load_state_dict goes on there, with any number of workers and ranks
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from .bad_samples import BadSample
from .buckets import BucketConfig, Lengths
from .shards import Fault, Sample
from .sources import DataConfig, SourceConfig, build_loader, mix, open_sources
from .steps import Prepared, StepLoader

BLOCKS_KEPT = 8
"""Blocks of memory, of up to 16 MiB, that Pillow keeps for the next pictures in a worker process."""


class ShardDataset(IterableDataset):
    """Batches of shards, in an order that depends on the seed alone, shared out among the ranks of a job.

    Iterated by itself it prepares batches in threads. In a `torch.utils.data.DataLoader` with `batch_size=None` each
    worker process prepares every so many-th batch, and what comes out is the same. There the dataset does not hear
    which batches were taken: use `ShardLoader` for a state, or for more than one iteration.

    Iterating ends after `epochs` passes, and iterating again goes on with the next ones, in another order. After a
    `break` it goes on with the batch that follows.

    Args:
        sources: the shards of one source, as a path, a folder or a pattern; or several sources, mixed by weight.
        batch_size: samples of this rank's batch; with `bucket` it says nothing.
        transform: of a sample; called in threads or workers. Its `ValueError`s, those of decoding among them, mean a
            bad sample. None: the sample as it is.
        collate: of the list of what `transform` returns. Default: torch's own, or without `transform` the list itself.
        seed: of the order.
        epochs: passes over a source in one iteration, 0.5 for half of one; None: without end. A source that says its
            own keeps them.
        rank, world_size: of this process. Default: those of torch.distributed, or of torchrun's environment.
        drop_last: leaves out a last step that would not give every rank a whole batch, so that all ranks take equally
            many. Default: where there are several ranks.
        on_bad, max_bad: what becomes of bad samples and of damage in shards; see `DataConfig`. `bad` and `faults` list
            them.
        bucket, lengths: for batches by length; see `herdkit.data.buckets`.
        threads, prefetch: where it is iterated by itself, and batches prepared ahead there.

    Raises:
        ShardError: a pattern matches no shard, or a shard is broken.
        LoaderError: on the way, for bad samples.
    """

    def __init__(
        self,
        sources: str | os.PathLike | Sequence[SourceConfig],
        batch_size: int = 1,
        *,
        transform: Callable[[Sample], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        epochs: float | None = 1.0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool | None = None,
        on_bad: Literal["raise", "skip"] = "raise",
        max_bad: float | None = None,
        bucket: BucketConfig | None = None,
        lengths: Lengths | None = None,
        threads: int = 1,
        prefetch: int = 2,
    ):
        if isinstance(sources, str | os.PathLike):
            sources = [SourceConfig(shards=os.fspath(sources))]
        limited = [replace(one, epochs=epochs if one.epochs is None else one.epochs) for one in sources]
        self.data = DataConfig(sources=limited, seed=seed, on_bad=on_bad, max_bad=max_bad, bucket=bucket)
        self.batch_size, self.transform, self.lengths = batch_size, transform, lengths
        self.collate = collate or (list if transform is None else default_collate)
        here, ranks = _layout()
        self.rank, self.world_size = here if rank is None else rank, ranks if world_size is None else world_size
        self.drop_last = self.world_size > 1 if drop_last is None else drop_last
        self.threads, self.prefetch = threads, prefetch
        self._readers = open_sources(self.data)
        self.loader = self._opened(0)

    @property
    def bad(self) -> list[BadSample]:
        """The samples left out of the batches taken, by this rank since it started."""
        return self.loader.bad

    @property
    def faults(self) -> list[Fault]:
        """What is damaged in the shards and left out of the order."""
        return self.loader.faults

    def __iter__(self) -> Iterator[Any]:
        for ready in self.prepared():
            if get_worker_info() is None:
                self.loader.hand_out(ready)
            else:
                self.loader.report(ready)
            if ready.batch is not None:
                yield ready.batch
        if get_worker_info() is None:
            self.next_turn()

    def prepared(self) -> Iterator[Prepared[Any]]:
        """What follows, not counted as taken: in a worker process its share of the steps, else all of them."""
        worker = get_worker_info()
        if worker is None:
            return self.loader.prepared(self.prefetch)
        return self.loader.prepared(0, worker.id, worker.num_workers)

    def next_turn(self) -> None:
        """Begins the passes of the next iteration."""
        bad = self.loader.bad, self.loader.bad_elsewhere
        self.loader.close()
        self.turn += 1
        self.loader = self._opened(self.turn)
        self.loader.bad, self.loader.bad_elsewhere = bad

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch taken, as plain JSON. In a worker process, and so wherever a plain DataLoader
        has workers, it does not move."""
        return {"turn": self.turn, **self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken when it is iterated next, also on another number of ranks.

        Raises:
            LoaderError: the seed, the sources, the epochs or the buckets differ.
        """
        self.loader.close()
        self.loader = self._opened(int(state["turn"]))
        self.loader.load_state_dict(state)

    def _opened(self, turn: int) -> StepLoader[Any]:
        self.turn = turn
        """How many iterations have come to their end."""
        return build_loader(
            self.data,
            mix(self.data, self._readers, turn),
            self._batch,
            self.batch_size,
            self.lengths,
            self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
            prefetch=self.prefetch,
            workers=self.threads,
        )

    def _batch(self, samples: list[tuple[int, Sample]]) -> Any:
        return self.collate([sample if self.transform is None else self.transform(sample) for _, sample in samples])


class ShardLoader:
    """Iterates a `ShardDataset` in worker processes, and knows which batches were taken, not only prepared.

    It holds a `torch.utils.data.DataLoader` and is none: `accelerator.prepare` of accelerate, which would share out or
    broadcast once more what is this rank's already, leaves it alone.

    Args:
        dataset: whose state it moves; `dataset.rank` says whose batches come.
        num_workers: processes; 0: the dataset's own threads.
        options: of the DataLoader, such as pin_memory, prefetch_factor, timeout or multiprocessing_context.
    """

    def __init__(self, dataset: ShardDataset, num_workers: int = 0, **options: Any):
        if options.get("persistent_workers"):
            raise ValueError("persistent_workers: the workers of every iteration start from the state of its beginning")
        self.dataset, self.num_workers, self.options = dataset, num_workers, options

    def __iter__(self) -> Iterator[Any]:
        workers: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "num_workers": self.num_workers}
        for ready in DataLoader(_Steps(self.dataset), **workers, **self.options):
            self.dataset.loader.hand_out(ready)
            if ready.batch is not None:
                yield ready.batch
        self.dataset.next_turn()

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch taken, as plain JSON."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken when it is iterated next, also with other numbers of workers and ranks;
        errors as in `ShardDataset.load_state_dict`."""
        self.dataset.load_state_dict(state)


class _Steps(IterableDataset):
    def __init__(self, dataset: ShardDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Prepared[Any]]:
        if get_worker_info() is not None:
            # Pillow gives the memory of every picture back to the system, which then hands out the next one's page by
            # page: an eighth of the time of decoding small ones.
            Image.core.set_blocks_max(BLOCKS_KEPT)
        return self.dataset.prepared()


def _unchanged(ready: Prepared[Any]) -> Prepared[Any]:
    return ready


def _layout() -> tuple[int, int]:
    """Rank and world size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
