"""The lines of a long job that may be killed at any moment: what is finished is kept, the result is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import finite, sync, write_json, write_text


class Journal:
    """Finished lines of a job: `<out>.partial` while it goes on, then `<out>`; `<out>.settings.json` beside them.

    Args:
        out: the file that is to be made; each of its lines is an object with an `id`.
        settings: what makes the result what it is, as JSON values; a job with others is refused.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings = out, settings
        self.partial = out.with_name(out.name + ".partial")
        self.record = out.with_name(out.name + ".settings.json")

    def read(self) -> dict[str | int, dict[str, Any]]:
        """What is finished, by id.

        Raises:
            ValueError: it was made with other settings. FileExistsError: `out` is no result of such a job.
        """
        if self.record.exists():
            earlier = json.loads(self.record.read_text())
            for name in sorted(earlier.keys() | self.settings.keys()):
                before, now = earlier.get(name), self.settings.get(name)
                if before != now:
                    raise ValueError(
                        f"{self.record}: was made with {name} = {before!r}, not {now!r}; delete {self.out.name}* to "
                        "begin anew, or choose another file"
                    )
        elif self.out.exists():
            raise FileExistsError(f"{self.out} exists and was not made here (no {self.record.name}); choose another")
        else:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.record, self.settings)
        if self.out.exists():
            return _by_id(self.out.read_bytes())
        if not self.partial.exists():
            return {}
        # A line that a kill cut short goes.
        content = self.partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.partial, len(whole))
        return _by_id(whole)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds lines durably."""
        with self.partial.open("ab") as file:
            file.write(b"".join(map(_line, lines)))
        sync(self.partial)

    def finish(self, lines: Sequence[dict[str, Any]]) -> None:
        """Writes the whole result, in this order."""
        if not self.out.exists():
            write_text(self.out, b"".join(map(_line, lines)).decode())
        self.partial.unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(finite(value), ensure_ascii=False).encode() + b"\n"


def _by_id(content: bytes) -> dict[str | int, dict[str, Any]]:
    entries = (json.loads(line) for line in content.split(b"\n") if line)
    return {entry["id"]: entry for entry in entries}
