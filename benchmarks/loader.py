"""Samples a second of this loader, of webdataset's own reader and, where it is installed, of Megatron-Energon: the same
shards, the same transform, the same number of worker processes, in turns.

    python benchmarks/loader.py [--workers 2] [--rounds 5] [--seconds 3]
    python benchmarks/loader.py --workers 0    # all in one process, and by its CPU time too: for a busy machine

Each shuffles as its users do (webdataset and Energon through a buffer of 1,000 samples, here over everything). Beside
them runs the transform alone, of samples that are in memory ("memory"): what no reader can go above. Prints one
JSON line with the medians of the rounds: for samples of 4 KiB as they are ("bytes"), and for JPEGs of 256 pixels
decoded and resized to 224 ("jpeg"); then how resident memory grows over a million samples of this loader, and how long
it takes to its first batch from the beginning and from far on.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from herdkit.data import Sample, ShardDataset, ShardLoader, ShardReader, ShardWriter
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate

BATCH = 64
BUFFER = 1000


def write_shards(folder: Path, workload: str, count: int) -> None:
    rng = random.Random(0)
    with ShardWriter(folder / "%06d.tar", max_count=2000) as writer:
        for number in range(count):
            if workload == "bytes":
                members = {"bin": rng.randbytes(4096), "json": {"number": number}}
            else:
                # Smooth, so that it compresses as photographs do: to about 15 KB.
                coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
                members = {"jpg": file.getvalue(), "json": {"number": number}}
            writer.write(f"{number:08d}", members)


def as_is(members: Any) -> bytes:
    return members["bin"]


def decode(members: Any) -> torch.Tensor:
    image = Image.open(io.BytesIO(members["jpg"])).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


WORKLOADS: dict[str, tuple[Callable[[Any], Any], Callable[[list], Any]]] = {
    "bytes": (as_is, list),
    "jpeg": (decode, default_collate),
}


class OfSample:
    """The transform of a sample's members, as an object that travels to workers."""

    def __init__(self, transform: Callable[[Any], Any]):
        self.transform = transform

    def __call__(self, sample: Sample) -> Any:
        return self.transform(sample.members)


def herdkit(folder: Path, workload: str, workers: int) -> Iterator[Any]:
    transform, collate = WORKLOADS[workload]
    options: dict[str, Any] = {"transform": OfSample(transform), "collate": collate, "epochs": None}
    dataset = ShardDataset(folder, BATCH, prefetch=0 if workers == 0 else 2, **options)
    return iter(ShardLoader(dataset, num_workers=workers))


def of_webdataset(folder: Path, workload: str, workers: int) -> Iterator[Any]:
    transform, collate = WORKLOADS[workload]
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
    batches = dataset.repeat().shuffle(BUFFER).map(transform).batched(BATCH, collation_fn=collate)
    return iter(webdataset.WebLoader(batches, batch_size=None, num_workers=workers))


def energon(folder: Path, workload: str, workers: int) -> Iterator[Any]:
    from megatron import energon  # type: ignore[import-not-found]

    transform, collate = WORKLOADS[workload]
    if not (folder / ".nv-meta").exists():
        program = Path(sys.executable).with_name("energon")
        options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        subprocess.run([program, "prepare", folder, *options, "--num-workers", "2"], check=True, capture_output=True)

    @dataclass
    class Item(energon.Sample):
        item: Any

    @energon.stateless
    def cook(members: dict) -> Item:
        return Item(**energon.basic_sample_keys(members), item=transform(members))

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(cook),)

        @energon.stateless
        def batch(self, samples: list[Item]) -> Any:
            return collate([sample.item for sample in samples])

    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = energon.get_train_dataset(
        folder,
        worker_config=config,
        batch_size=BATCH,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    return iter(energon.get_savable_loader(dataset))


class InMemory(IterableDataset):
    """Batches of some samples over and over."""

    def __init__(self, folder: Path, workload: str):
        reader = ShardReader(folder)
        self.members = [reader[i].members for i in range(8 * BATCH)]
        self.transform, self.collate = WORKLOADS[workload]

    def __iter__(self) -> Iterator[Any]:
        samples = itertools.cycle(self.members)
        while True:
            yield self.collate([self.transform(members) for members in itertools.islice(samples, BATCH)])


def memory(folder: Path, workload: str, workers: int) -> Iterator[Any]:
    return iter(DataLoader(InMemory(folder, workload), batch_size=None, num_workers=workers))


READERS = {"herdkit": herdkit, "webdataset": of_webdataset, "energon": energon, "memory": memory}


def rates(batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Samples a second, and a second of this process's CPU time."""
    for _ in range(8):  # what was prepared while the others had their turn
        next(batches)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += BATCH
    return count / passed, count / (time.process_time() - cpu)


def compare(folder: Path, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    running, missing = {}, {}
    for name in options.readers:
        try:
            running[name] = READERS[name](folder, workload, options.workers)
            next(running[name])
        except ImportError as error:
            missing[name] = str(error)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, batches in running.items():
            found[name].append(rates(batches, options.seconds))
    result: dict[str, Any] = {}
    for column, unit in enumerate(("samples_per_second", "samples_per_cpu_second")[: 1 + (options.workers == 0)]):
        result[unit] = {name: round(median(row[column] for row in rows)) for name, rows in found.items()}
        pairs = {name: zip(found["herdkit"], rows, strict=True) for name, rows in found.items() if name != "herdkit"}
        ratios = {name: median(ours[column] / theirs[column] for ours, theirs in both) for name, both in pairs.items()}
        result[f"ratio_of_{unit}"] = {name: round(ratio, 2) for name, ratio in ratios.items()}
    return result | ({"not_installed": missing} if missing else {})


def resident(folder: Path, count: int) -> dict[str, int]:
    """Resident bytes after a tenth of so many samples, and after all."""
    dataset = ShardDataset(folder, 256, transform=OfSample(as_is), collate=list, epochs=None, threads=1)
    page, found = resource.getpagesize(), []
    for number, _ in enumerate(dataset, 1):
        if number * 256 >= (count // 10, count)[len(found)]:
            found.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            if len(found) == 2:
                break
    dataset.loader.close()
    return {"samples": count, "after_a_tenth": found[0], "after_all": found[1], "growth": found[1] - found[0]}


def resume(folder: Path) -> dict[str, float]:
    """Seconds from opening the shards to the first batch, at positions of the order."""
    found = {}
    for position in (0, 10**7, 10**10):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            dataset = ShardDataset(folder, BATCH, transform=OfSample(as_is), collate=list, epochs=None, prefetch=0)
            dataset.load_state_dict({**dataset.state_dict(), "consumed": position})
            next(iter(dataset))
            seconds.append(time.perf_counter() - start)
        found[f"{position:.0e}"] = round(median(seconds), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each reader in each round")
    parser.add_argument("--samples", type=int, default=20_000, help="of the shards of bytes; a fifth of JPEGs")
    parser.add_argument("--memory-samples", type=int, default=1_000_000)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "loader", "workers": options.workers, "batch": BATCH}
    with tempfile.TemporaryDirectory() as root:
        for workload, count in (("bytes", options.samples), ("jpeg", options.samples // 5)):
            write_shards(Path(root) / workload, workload, count)
            result[workload] = compare(Path(root) / workload, workload, options)
        result["seconds_to_first_batch"] = resume(Path(root) / "bytes")
        if options.memory_samples:
            result["resident_bytes"] = resident(Path(root) / "bytes", options.memory_samples)
    result |= {"device": platform.processor() or platform.machine(), "webdataset": webdataset.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
