"""Asks a run that is training for a profile: a file in its directory, which the trainer takes between two updates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from .files import write_json
from .profiles import tables
from .run_view import read_run

REQUEST = "profile"
LOOK_EVERY = 1.0  # seconds
WRITING = 900.0  # seconds that a run may be silent over a profile: traces of large models take minutes to write


class ProfileError(RuntimeError):
    """No profile is to be had; one line."""


@dataclass(frozen=True)
class ProfileRequest:
    """What to trace.

    Args:
        updates: how many, one after the other.
        ranks: the processes that write a trace; None: all.
    """

    updates: int = 3
    ranks: list[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.updates, int) or self.updates < 1:
            raise ProfileError(f"updates must be at least 1, not {self.updates!r}")
        if self.ranks is not None and not (self.ranks and all(isinstance(r, int) and r >= 0 for r in self.ranks)):
            raise ProfileError(f"ranks must be numbers of processes, from 0 on, not {self.ranks!r}")

    def of(self, rank: int) -> bool:
        """Whether that process writes a trace."""
        return self.ranks is None or rank in self.ranks


def take_request(run_dir: Path) -> ProfileRequest:
    """Removes the request and returns it; an empty file asks for the defaults.

    Raises:
        ProfileError: it is not to be understood.
    """
    path = run_dir / REQUEST
    try:
        content = path.read_bytes()
        path.unlink()
    except OSError as error:  # withdrawn, for one
        raise ProfileError(f"{path}: the request for a profile cannot be taken: {error.strerror}") from None
    try:
        return ProfileRequest(**json.loads(content)) if content.strip() else ProfileRequest()
    except (ValueError, TypeError) as error:
        raise ProfileError(f"{path}: no request for a profile ({error}); leave the file empty for the usual") from None


def ask(run_dir: Path, request: ProfileRequest, say: Callable[[str], None] = lambda text: None) -> Path:
    """Asks for a profile and waits until it is there.

    Returns:
        Its table; see `profiles.traces_of` for the traces.

    Raises:
        RunDirectoryError: there is no run.
        ProfileError: the run is not running, or ended, or fell silent, before there was a profile.
    """
    before = {path: path.stat().st_mtime_ns for path in tables(run_dir)}
    path = run_dir / REQUEST
    if (reason := _why_not_running(run_dir, patience=0.0)) is not None:
        raise ProfileError(f"{reason}; only a run that is training can be profiled (or set trainer.profile_at)")
    if path.exists():
        raise ProfileError(f"{path}: somebody has asked for a profile already; delete it to withdraw that")
    write_json(path, asdict(request))
    say(f"{run_dir}: asked for a profile; waiting for the end of the update at hand")
    is_taken = False
    try:
        while True:
            reason = _why_not_running(run_dir, patience=WRITING if is_taken else 0.0)
            # Looked for after that: a run that has ended may have left it just before.
            new = [table for table in tables(run_dir) if before.get(table) != table.stat().st_mtime_ns]
            if new:
                return new[-1]
            if reason is not None:
                raise ProfileError(f"{reason}; it left no profile")
            if not is_taken and not path.exists():
                is_taken = True
                say(f"{run_dir}: profiling")
            time.sleep(LOOK_EVERY)
    finally:
        if not is_taken:
            path.unlink(missing_ok=True)


def _why_not_running(run_dir: Path, patience: float) -> str | None:
    run = read_run(run_dir)
    is_busy = run.state == "silent" and run.quiet < patience
    return None if run.state == "running" or is_busy else f"{run_dir}: {run.account}"
