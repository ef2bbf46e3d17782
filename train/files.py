"""Files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Makes a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file, at any moment, is the old one or the new one."""
    write_text(path, json.dumps(finite(value), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Likewise for text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Likewise for anything."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def copy_tree(source: Path, to: Path) -> None:
    """Copies what is in a directory into another one, so that it is durable; not at once: what fails half way leaves
    what it has copied."""
    to.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_tree(path, to / path.name)
        else:
            sync(Path(shutil.copy2(path, to / path.name)))
    sync(to)


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of a log in JSON that a checkpoint of so many updates knows of, if there is one: a killed run may
    have logged more than it saved, and its last line may be cut short."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log in JSON that may be in the making, or not be there. Lines cut short, by the reading or by a
    machine that died, are left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def last_step(path: Path) -> int:
    """The step of the last whole line of a log, 0 where there is none."""
    lines = read_lines(path)
    return lines[-1]["step"] if lines else 0


def finite(value: Any) -> Any:
    """JSON values with null for numbers that JSON does not have (nan, inf)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
