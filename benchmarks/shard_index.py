"""How fast tar shards are indexed and their indexes opened, beside tarfile and webdataset's own iteration.

`python benchmarks/shard_index.py [--samples 100000]` makes shards with two members of 200 bytes a sample in a temporary
folder, as `ShardWriter` writes them ("plain") and with the pax header before each member that webdataset's `TarWriter`
writes by default ("pax"). Rates are samples per second of CPU time of one core, from the page cache, the best of three.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import webdataset
from herdkit.data import shard_files
from herdkit.data.byte_cache import ByteCache
from herdkit.data.index_files import scan_shard
from herdkit.data.shard_files import LocalFile
from herdkit.data.shard_index import ShardIndex, Stamp, narrowed
from herdkit.data.shards import ShardReader
from webdataset.writer import TarWriter

REPEATS = 3
SLOW = 10
"""The others are measured on this part of the samples."""


def cpu_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    def once() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return min(once() for _ in range(repeats))


def write(path: Path, samples: int, **options: object) -> Path:
    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False, compress=False, **options)
        for i in range(samples):
            writer.write({"__key__": f"{i:08d}", "json": b"j" * 200, "txt": b"t" * 200})
        writer.close()
    return path


def by_tarfile(path: Path) -> None:
    with tarfile.open(path, "r:") as tar:
        for _ in tar:
            pass


def by_webdataset(path: Path) -> None:
    for _ in webdataset.WebDataset([str(path)], shardshuffle=False):
        pass


def indexing(folder: Path, samples: int) -> dict[str, dict[str, int]]:
    rates, cache = {}, ByteCache(folder / "cache")
    for kind, options in (("plain", {"mtime": 0, "user": "", "group": ""}), ("pax", {})):
        path = write(folder / f"{kind}.tar", samples, **options)
        part = write(folder / f"{kind}-part.tar", samples // SLOW, **options)
        rates[kind] = {
            "herdkit": round(samples / cpu_seconds(lambda path=path: scan_shard(LocalFile(path), cache))),
            "tarfile": round(samples / SLOW / cpu_seconds(lambda part=part: by_tarfile(part))),
            "webdataset": round(samples / SLOW / cpu_seconds(lambda part=part: by_webdataset(part))),
        }
    return rates


def reading(folder: Path, count: int = 20_000) -> dict[str, int]:
    """Samples per second, at random."""
    reader = ShardReader(folder / "plain.tar")
    order = [random.Random(0).randrange(len(reader)) for _ in range(count)]
    kept = cpu_seconds(lambda: [reader[i] for i in order])
    opened, shard_files._opened = shard_files._opened, shard_files._opened.__wrapped__
    anew = cpu_seconds(lambda: [reader[i] for i in order])
    shard_files._opened = opened
    return {"files_kept_open": round(count / kept), "files_opened_for_each": round(count / anew)}


def opening(folder: Path, samples: int) -> dict[str, float]:
    """Of an index with two members a sample: its size, the time to open it and to look at 1000 samples, the memory."""
    members = np.arange(2 * samples, dtype=np.uint64)
    index = ShardIndex(
        stamp=Stamp(0, "", ""),
        compression="",
        extension_names=["json", "txt"],
        unit=512,
        starts=narrowed(members[: samples + 1] * np.uint64(2)),
        key_starts=narrowed(members[: samples + 1] * np.uint64(8)),
        keys=np.strings.zfill(np.arange(samples).astype("U8"), 8).astype("S8").view(np.uint8),
        offsets=narrowed(members * np.uint64(2) + np.uint64(1)),
        sizes=narrowed(members % np.uint64(500)),
        headers=members.astype(np.uint32),
        extensions=narrowed(members % np.uint64(2)),
    )
    path = folder / f"{samples}.index"
    path.write_bytes(index.to_bytes())
    del index, members
    process, order = psutil.Process(), [random.Random(0).randrange(samples) for _ in range(1000)]

    def own_memory() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared

    before, start = own_memory(), time.perf_counter()
    opened = ShardIndex.open(path, "")
    seconds = time.perf_counter() - start
    for i in order:
        opened.key(i), opened.members(i)
    looked = time.perf_counter() - start
    return {
        "open_ms": round(1e3 * seconds, 3),
        "open_and_look_up_1000_ms": round(1e3 * looked, 3),
        "bytes_per_sample": round(path.stat().st_size / samples, 1),
        "memory_bytes": own_memory() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--indexes", type=int, nargs="*", default=[1_000_000, 10_000_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "samples_per_second_indexed": indexing(folder, options.samples),
            "samples_per_second_read": reading(folder),
            "indexes": {str(samples): opening(folder, samples) for samples in options.indexes},
            "load": os.getloadavg()[0],
            "device": platform.processor() or platform.machine(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
