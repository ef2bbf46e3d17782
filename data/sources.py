"""The data section of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from .buckets import BucketConfig, BucketLoader, Lengths
from .loader import Loader
from .mixture import Mixture
from .shards import Sample, ShardReader
from .steps import LoaderOptions, StepLoader

Batch = TypeVar("Batch")


@dataclass(kw_only=True)
class SourceConfig:
    """One source of samples.

    Args:
        shards: path, glob or brace pattern of its tars ("captions-{000000..000011}.tar").
        weight: share of the mixture relative to the other sources.
        name: belongs to the order of the samples. Default: the last folder and the file pattern of `shards`, so that
            the order is the same wherever the data lie; all of `shards` where two sources would have one name.
        epochs: at most so many passes, 2.5 for instance; then the other sources go on with their weights, and where
            none is left the data end. None: no limit.
    """

    shards: str
    weight: float = 1.0
    name: str = ""
    epochs: float | None = None


@dataclass(kw_only=True)
class DataConfig:
    """What a stage trains on.

    Args:
        sources: mixed by weight, exactly at every prefix.
        seed: of the order.
        row_length: tokens of a row at most.
        on_bad: "raise" stops at a bad sample and names it, "skip" leaves it out, logs it and goes on.
        max_bad: with "skip", at most so many bad samples over all processes, or, below 1, such a share of the samples
            consumed (of the first thousand until those are); then the run stops. None: any number.
        bucket: batches of samples of like length within a budget, in place of so many samples each; `batch_size` of the
            trainer then says nothing but what is logged as samples. None: without.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    seed: int = 0
    row_length: int = 2048
    on_bad: Literal["raise", "skip"] = "raise"
    max_bad: float | None = None
    bucket: BucketConfig | None = None


def open_loader(
    data: DataConfig,
    collate: Callable[[list[tuple[int, Sample]]], Batch],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    lengths: Lengths | None = None,
    drop_last: bool = False,
) -> StepLoader[Batch]:
    """Opens the shards and mixes them; `batch_size` is this process's, `drop_last` as in `Loader`, `lengths` as in
    `BucketLoader`.

    Raises:
        ValueError: there are no sources, or `epochs` of one that hold no sample; `data.bucket` is given and `lengths`
            is not.
        ShardError: a pattern matches no shard, or a shard is broken.
    """
    readers = open_sources(data)
    weights = [source.weight for source in data.sources]
    parts = [(*named, weight) for named, weight in zip(readers.items(), weights, strict=True)]
    mixture = Mixture(parts, epochs=epoch_limits(data))
    options: LoaderOptions = {
        "seed": data.seed,
        "rank": rank,
        "world_size": world_size,
        "on_bad": data.on_bad,
        "max_bad": data.max_bad,
    }
    if data.bucket is None:
        return Loader(mixture, collate, batch_size, drop_last=drop_last, **options)
    if lengths is None and data.bucket.by == "length":
        raise ValueError("data.bucket: this stage measures no lengths of its samples; set data.bucket.by to bytes")
    return BucketLoader(mixture, collate, data.bucket, lengths, drop_last=drop_last, **options)


def open_sources(data: DataConfig) -> dict[str, ShardReader]:
    """A reader for each source, by name; errors as of `open_loader`."""
    if not data.sources:
        raise ValueError("data.sources is empty; name at least one set of shards")
    return dict(zip(source_names(data.sources), (ShardReader(source.shards) for source in data.sources), strict=True))


def epoch_limits(data: DataConfig) -> dict[str, float | None]:
    """How many passes of each source there may be, by name."""
    return dict(zip(source_names(data.sources), (source.epochs for source in data.sources), strict=True))


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """The name of each source, given or made, see `SourceConfig`."""
    short = ["/".join(Path(source.shards).parts[-2:]) for source in sources]
    made = short if len(set(short)) == len(short) else [source.shards for source in sources]
    return [source.name or name for source, name in zip(sources, made, strict=True)]
