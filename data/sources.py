"""The data section of a recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, Unpack

from .bad_samples import check_budget
from .buckets import BucketConfig, BucketLoader, Lengths
from .loader import Loader
from .mixture import Mixture, Source
from .shards import ShardReader
from .steps import Batch, Collate, LoaderOptions, StepLoader

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 20


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

    def __post_init__(self) -> None:
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs must be above 0, not {self.epochs}")


@dataclass(kw_only=True)
class DataConfig:
    """What a stage trains on.

    Args:
        sources: mixed by weight, exactly at every prefix.
        seed: of the order.
        row_length: tokens of a row at most.
        on_bad: "raise" stops at a bad sample and names it, "skip" leaves it out, logs it and goes on. So with what is
            damaged in a shard, where one fault may stand for several samples.
        max_bad: with "skip", at most so many bad samples over all processes, or, below 1, such a share of the samples
            consumed (of the first thousand until those are); then the run stops. Faults of shards are known when these
            are opened and count by themselves, a share being one of all samples. None: any number.
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
    collate: Collate[Batch],
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
        ValueError: there are no sources, or `epochs` of one that hold no sample; `data.bucket` needs lengths and the
            stage gives none.
        ShardError: a pattern matches no shard, or a shard is damaged.
        LoaderError: shards have more faults than `max_bad` allows.
    """
    mixture = mix(data, open_sources(data))
    return build_loader(data, mixture, collate, batch_size, lengths, drop_last, rank=rank, world_size=world_size)


def open_sources(data: DataConfig) -> dict[str, ShardReader]:
    """A reader for each source, by name, which leaves out what is damaged in the shards if bad samples are skipped;
    errors as of `open_loader`."""
    if not data.sources:
        raise ValueError("data.sources is empty; name at least one set of shards")
    readers = [ShardReader(source.shards, on_fault=data.on_bad) for source in data.sources]
    faults = [fault for reader in readers for fault in reader.faults]
    for fault in faults[:SHOWN_FAULTS]:
        logger.warning("left out %s", fault)
    if len(faults) > SHOWN_FAULTS:
        logger.warning("left out %d more; herdkit shards index names all of them", len(faults) - SHOWN_FAULTS)
    check_budget(data.max_bad, len(faults), sum(map(len, readers)), faults)
    return dict(zip(source_names(data.sources), readers, strict=True))


def mix(data: DataConfig, readers: Mapping[str, Source], turn: int = 0) -> Mixture:
    """The sources of `data`, opened, as a mixture. Where all are limited, turn 0 draws each as often as it may, and
    every later turn goes on from where the one before ended."""
    limits = epoch_limits(data)
    weights = [source.weight for source in data.sources]
    parts = [(*named, weight) for named, weight in zip(readers.items(), weights, strict=True)]
    drawn = {name: int((limit or 0) * turn * len(readers[name])) for name, limit in limits.items()}
    return Mixture(parts, drawn, {name: limit and limit * (turn + 1) for name, limit in limits.items()})


def build_loader(
    data: DataConfig,
    mixture: Mixture,
    collate: Collate[Batch],
    batch_size: int,
    lengths: Lengths | None = None,
    drop_last: bool = False,
    **options: Unpack[LoaderOptions],
) -> StepLoader[Batch]:
    """The loader of a mixture that `data` asks for; the rest as in `open_loader`."""
    policy: LoaderOptions = {**options, "seed": data.seed, "on_bad": data.on_bad, "max_bad": data.max_bad}
    if data.bucket is None:
        return Loader(mixture, collate, batch_size, drop_last=drop_last, **policy)
    if lengths is None and data.bucket.by == "length":
        raise ValueError("data.bucket: this stage measures no lengths of its samples; set data.bucket.by to bytes")
    return BucketLoader(mixture, collate, data.bucket, lengths, drop_last=drop_last, **policy)


def epoch_limits(data: DataConfig) -> dict[str, Fraction | None]:
    """How many passes of each source there may be, by name."""
    given = [None if source.epochs is None else Fraction(str(source.epochs)) for source in data.sources]
    return dict(zip(source_names(data.sources), given, strict=True))


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """The name of each source, given or made, see `SourceConfig`."""
    short = ["/".join(Path(source.shards).parts[-2:]) for source in sources]
    made = short if len(set(short)) == len(short) else [source.shards for source in sources]
    return [source.name or name for source, name in zip(sources, made, strict=True)]
