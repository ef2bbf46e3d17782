"""Checkpoints on disk: named tensors through torch's distributed checkpoint and one JSON of small state.

A checkpoint is the directory `checkpoints/step-00000100` of a run. It is written under another name, made
durable, given a manifest of sizes and hashes, and only then renamed: a directory of that name is complete, or
was damaged later, which the manifest shows. No object is ever pickled into it by us.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from . import parallel
from .files import sync, write_json

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or does not fit the model."""


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes the checkpoint of `step` finished updates and deletes all but the `keep` newest. All processes of a group
    call it, and share a file system; it raises on all or on none.

    Args:
        tensors: detached; may be on any device. Of a `DTensor` each process writes its part, of whole tensors each
            writes some.
        state: JSON values; those of the first process count.
        keep_every: checkpoints whose step is a multiple of it are never deleted.
        group: None: all processes there are.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    temporary = parallel.on_first(lambda: _begin(final), group)
    with _alone():
        write_tensors(
            dict(tensors),
            storage_writer=FileSystemWriter(temporary / TENSORS),
            process_group=group,
            no_dist=parallel.world_size() == 1,
        )
    described = parallel.on_each(lambda: _own_files(temporary, group), group)

    def finish() -> None:
        write_json(temporary / STATE, state)
        last = [temporary / STATE, temporary / TENSORS / ".metadata"]
        manifest = dict(sorted(pair for own in described for pair in own.items())) | _durable(temporary, last)
        sync(temporary / TENSORS)
        write_json(temporary / MANIFEST, {"step": step, "files": manifest})
        sync(temporary)
        if final.exists():  # a damaged one, or the run would have gone on from it
            _delete(final)
        temporary.rename(final)
        sync(final.parent)
        # A later step that is still there is damaged, or the run would have gone on from it: it does not count.
        older = [path for path in list_checkpoints(run_dir) if step_of(path) <= step][keep:]
        for path in older:
            if keep_every is None or step_of(path) % keep_every:
                _delete(path)

    parallel.on_first(finish, group)
    return final


def _begin(final: Path) -> Path:
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    return temporary


def _own_files(temporary: Path, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """What this process wrote, for the manifest."""
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    return _durable(temporary, sorted((temporary / TENSORS).glob(f"__{rank}_*")))


def _durable(temporary: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    for path in files:
        sync(path)
    return {str(path.relative_to(temporary)): _describe(path) for path in files}


def latest_complete(run_dir: Path, report: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of a run, or None; reports a line on each newer one that is not whole."""
    for path in list_checkpoints(run_dir):
        damage = find_damage(path)
        if damage is None:
            return path
        report(f"checkpoint {path} ignored: {damage}")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if nothing is."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = json.loads((path / MANIFEST).read_text())["files"]
    except (ValueError, KeyError) as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != expected["bytes"]:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
        if _describe(path / name) != expected:
            return f"{name} does not have the content that was written"
    return None


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text())


def describe_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a checkpoint's tensors, without reading them."""
    metadata = FileSystemReader(path / TENSORS).read_metadata().state_dict_metadata
    return {
        name: (tuple(item.size), item.properties.dtype)
        for name, item in metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads tensors in place, whatever device they are on.

    Raises:
        CheckpointError: a name is not in the checkpoint, or has another shape or dtype there.
    """
    stored = describe_tensors(path)
    problems = [f"{name} is not in it" for name in tensors if name not in stored]
    for name in tensors.keys() & stored.keys():
        wanted = (tuple(tensors[name].shape), tensors[name].dtype)
        if wanted != stored[name]:
            problems.append(f"{name} is {_tell(*stored[name])} in it and {_tell(*wanted)} in the model")
    if problems:
        raise CheckpointError(f"checkpoint {path} does not fit: {'; '.join(sorted(problems)[:8])}")
    with _alone():
        read_tensors(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=FileSystemReader(path / TENSORS),
            no_dist=True,
        )


def remove_unfinished(run_dir: Path, report: Callable[[str], None] = print) -> None:
    """Deletes what a killed process left of a checkpoint in the making or in its deletion."""
    for path in sorted((run_dir / "checkpoints").glob(".step-*")):
        report(f"checkpoint {path} was cut short: removed")
        shutil.rmtree(path)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories, newest first, whole or not."""
    paths = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in paths if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The number of finished updates in a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that `no_dist`, which we ask for, is what we get."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _delete(path: Path) -> None:
    # Under another name it is no checkpoint any more, wherever the deletion is cut short.
    leaving = path.with_name(f".{path.name}.deleted")
    path.rename(leaving)
    shutil.rmtree(leaving)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _tell(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"
