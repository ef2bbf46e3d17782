"""Folders and shards of recordings to a file of transcripts: in groups, resumable, the result whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.media_check import audio_of, kind_of
from ..data.shards import Sample, ShardReader
from ..train.files import write_text
from ..train.journal import Journal
from ..train.progress import ProgressLine
from .alignment import Word
from .subtitles import srt, vtt
from .transcribe import TextSegment, Transcriber

GROUP = 16
"""Recordings that are read together, so that their segments fill batches."""


@dataclass
class Recording:
    """One to transcribe.

    Args:
        id: the path of its file, or "shard: key".
        source: what `Transcriber` takes: a path, or a sample of a shard, of which it is the audio.
    """

    id: str
    source: str | tuple[ShardReader, int]

    def open(self) -> tuple[str | bytes, dict[str, Any]]:
        """What to decode, and what else is known: `reference`, what is said (the member `txt`), and `language`.

        Raises:
            ValueError: a sample without audio, or with a `txt` or `json` that cannot be read.
        """
        if isinstance(self.source, str):
            return self.source, {}
        reader, position = self.source
        sample: Sample = reader[position]
        audio = audio_of(sample)
        known: dict[str, Any] = {}
        if "txt" in sample.members:
            known["reference"] = sample.text("txt")
        content = sample.json() if "json" in sample.members else None
        if isinstance(content, dict):
            known |= {name: content[name] for name in ("language", "voice") if isinstance(content.get(name), str)}
        return audio, known


def find_recordings(sources: Sequence[str]) -> list[Recording]:
    """Files as they are named, the audio files of folders and of those below them, and the samples of shards (".tar" at
    the end).

    Raises:
        FileNotFoundError: no such file or folder, or a folder without an audio file.
        ShardError: see `ShardReader`.
    """
    found: list[Recording] = []
    for source in sources:
        if source.endswith((".tar", ".tar.gz", ".tgz")):
            reader = ShardReader(source)
            for position in range(len(reader)):
                shard, key = reader.name(position)
                found.append(Recording(f"{shard}: {key}", (reader, position)))
        elif Path(source).is_dir():
            inside = sorted(_audio_files(Path(source)))
            if not inside:
                raise FileNotFoundError(f"{source}: no audio file in it or below it")
            found += [Recording(path, path) for path in inside]
        elif Path(source).exists():
            found.append(Recording(source, source))
        else:
            raise FileNotFoundError(f"{source}: no such file or folder")
    return list({recording.id: recording for recording in found}.values())


def _audio_files(folder: Path) -> Iterator[str]:
    for directory, _, names in os.walk(folder):
        yield from (os.path.join(directory, name) for name in names if kind_of(name.lower()) == "audio")  # noqa: PTH118


def transcribe_files(
    transcriber: Transcriber,
    recordings: Sequence[Recording],
    out: Path,
    *,
    settings: dict[str, Any] | None = None,
    subtitles: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """Writes `out`: for each recording, in their order, a line of JSON with its `id` and `Transcript.as_json`.

    `out` appears when all is done. Until then finished recordings are kept in `out` + `.partial`; the same call goes on
    from there, at whatever moment it was killed, and gives the same file.

    Args:
        settings: what else makes the result what it is, such as the model's path.
        subtitles: "srt" or "vtt" to the folder that gets a file for each recording with text.

    Returns: how many recordings have each status, and in how many a text was `cut`; `real_time`, the seconds of audio
        that a second of this call took.

    Raises:
        ValueError: see `Journal`.
    """
    ids = [recording.id for recording in recordings]
    record = {
        "recordings": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        **dataclasses.asdict(transcriber.config),
        **(settings or {}),
    }
    journal = Journal(out, json.loads(json.dumps(record)))
    done = journal.read()
    heard, started = 0.0, time.monotonic()
    with ProgressLine("recordings", len(recordings), len(done)) as progress:
        for first in range(0, len(recordings), GROUP):
            group = recordings[first : first + GROUP]
            if all(recording.id in done for recording in group):
                continue
            # A group that was cut short runs again as a whole: the last digits of a row depend on its batch.
            lines = [line for line in _group(transcriber, group) if line["id"] not in done]
            journal.append(lines)
            done |= {line["id"]: line for line in lines}
            heard += sum(line.get("seconds", 0.0) for line in lines)
            progress.update(len(done), f"{heard / (time.monotonic() - started):.1f} x real time")
    lines = [done[recording.id] for recording in recordings]
    journal.finish(lines)
    for kind, folder in (subtitles or {}).items():
        write_subtitles(lines, kind, folder)
    seconds = time.monotonic() - started
    counts = {
        status: sum(line["status"] == status for line in lines) for status in ("ok", "no speech", "empty", "error")
    }
    counts["cut"] = sum(any(segment.get("cut") for segment in line.get("segments", ())) for line in lines)
    rate = round(heard / seconds, 2) if heard else None
    return {"out": str(out), "recordings": len(lines), **counts, "seconds": round(seconds, 3), "real_time": rate}


def _group(transcriber: Transcriber, group: Sequence[Recording]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"id": recording.id} for recording in group]
    opened: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def sources() -> Iterator[str | bytes]:
        for recording, line in zip(group, lines, strict=True):
            try:
                source, known = recording.open()
            except ValueError as error:
                line.update(status="error", error=" ".join(str(error).split()))
            else:
                opened.append((line, known))
                yield source

    transcripts = transcriber(sources())
    for (line, known), transcript in zip(opened, transcripts, strict=True):
        line.update(transcript.as_json() | known)
    return lines


def write_subtitles(lines: Sequence[dict[str, Any]], kind: str, folder: Path) -> None:
    """A file of subtitles for each recording with text, named after it; equal names are numbered.

    Args:
        lines: as `transcribe_files` writes them.
        kind: "srt" or "vtt".
    """
    folder.mkdir(parents=True, exist_ok=True)
    make, used = {"srt": srt, "vtt": vtt}[kind], set()
    for line in lines:
        if line["status"] != "ok":
            continue
        stem = name = Path(line["id"].split(": ")[-1]).stem
        number = 1
        while name in used:
            number += 1
            name = f"{stem}-{number}"
        used.add(name)
        write_text(folder / f"{name}.{kind}", make([read_segment(segment) for segment in line["segments"]]))


def read_segment(values: dict[str, Any]) -> TextSegment:
    """A segment from JSON."""
    words = values.get("words")
    return TextSegment(**{**values, "words": None if words is None else [Word(**word) for word in words]})
