"""The directory of a run: recipe.json, environment.json, metrics.jsonl, starts.jsonl, bad_samples.jsonl,
checkpoints/, profiles/, result.json, and what trackers keep there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, parallel
from .files import write_json
from .peak_flops import device_name

MAY_CHANGE = (
    "steps", "accumulate", "checkpoint_every", "keep", "keep_every", "background_checkpoints", "log_every",
    "evaluate_every", "non_finite", "spikes", "stall_seconds", "stall_action", "straggler_factor",
    "check_replicas_every", "trackers", "profile_at",
)  # fmt: skip
"""Fields of TrainerConfig that may change when a run is resumed: its length, layout, log and caution."""


class RunDirectoryError(RuntimeError):
    """The directory cannot hold this run."""


def open_run(run_dir: Path, recipe: dict[str, Any], report: Callable[[str], None]) -> Path | None:
    """Prepares a run directory and finds where to go on. One process calls it.

    Returns:
        The newest whole checkpoint, or None for a fresh start.

    Raises:
        RunDirectoryError: a checkpoint in it was made by another recipe.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise RunDirectoryError(f"{run_dir}: is a file; a run needs a directory")
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_unfinished(run_dir, report)
    latest = checkpoint.latest_complete(run_dir, report)
    recipe = json.loads(json.dumps(recipe, default=str))
    recorded = run_dir / "recipe.json"
    if latest is not None and recorded.exists():
        changes = differences(json.loads(recorded.read_text()), recipe)
        if changes:
            raise RunDirectoryError(
                f"{run_dir} holds a run of another recipe: {'; '.join(changes[:6])}"
                f"{f'; and {len(changes) - 6} more' if len(changes) > 6 else ''}. "
                "Choose another run directory, undo the change to resume, or delete it to start over"
            )
    write_json(recorded, recipe)
    write_json(run_dir / "environment.json", environment())
    return latest


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines "key: old -> new" for what matters and is not equal in two nests of JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if not _may_change(where, key)]
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _may_change(where: str, key: str) -> bool:
    of_trainer = where.rpartition(".")[2] == "trainer" and key in MAY_CHANGE
    return of_trainer or key in ("run_dir", "logging") or (not where and key == "parallel")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def environment() -> dict[str, Any]:
    """Versions, device and layout of this start of a run."""
    packages = ("torch", "torchvision", "torchaudio", "numpy", "herdkit")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "commit": commit(),
        "device": device_name(parallel.device()),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of this code, "-dirty" if files differ from it; None where it is no git checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:  # no git program
        return None
    return described.stdout.strip() or None


def read_result(run_dir: Path, steps: int) -> dict[str, Any] | None:
    """The result of a run of so many steps, if it is there."""
    path = run_dir / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result is not None and result["steps"] == steps else None
