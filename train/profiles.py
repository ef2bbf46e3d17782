"""The folder `profiles` of a run: for each profile a table, and a trace of each process."""

from __future__ import annotations

from pathlib import Path

PROFILES = "profiles"


def table_path(run_dir: Path, step: int) -> Path:
    return run_dir / PROFILES / f"step-{step:08d}.txt"


def trace_path(run_dir: Path, step: int, rank: int) -> Path:
    return run_dir / PROFILES / f"step-{step:08d}-rank-{rank}.json.gz"


def tables(run_dir: Path) -> list[Path]:
    """Of all profiles, in the order in which they were made."""
    return sorted((run_dir / PROFILES).glob("step-*.txt"), key=lambda path: path.stat().st_mtime_ns)


def traces_of(table: Path) -> list[Path]:
    """The traces that belong to a table, by rank."""
    paths = table.parent.glob(f"{table.stem}-rank-*.json.gz")
    return sorted(paths, key=lambda path: int(path.name.removesuffix(".json.gz").rpartition("-")[2]))


def remove_unfinished(run_dir: Path) -> None:
    """Removes what a process left that was killed while it wrote."""
    for path in (run_dir / PROFILES).glob(".*"):
        path.unlink()
