"""Whether the members of a sample are what their extensions say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .dialogs import dialog_sample
from .media import MediaError, load_audio, load_image, load_video
from .shards import Sample

_EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff", "jp2", "ppm", "pgm", "qoi", "ico"),
    "video": ("mp4", "m4v", "webm", "mkv", "mov", "avi", "mpg", "mpeg", "wmv", "flv"),
    "audio": ("flac", "wav", "ogg", "oga", "opus", "mp3", "m4a", "aac", "aif", "aiff", "au", "wma"),
    "text": ("txt", "text", "md", "html", "htm", "xml", "csv", "tsv", "jsonl", "srt", "vtt", "cls"),
    "json": ("json",),
}
_KIND = {extension: kind for kind, extensions in _EXTENSIONS.items() for extension in extensions}

CHECKED_FRAMES = 16


def kind_of(extension: str) -> str | None:
    """ "image", "video", "audio", "text" or "json", by what stands after the last dot ("seg.png"); else None."""
    return _KIND.get(extension.rpartition(".")[2])


def audio_of(sample: Sample) -> bytes:
    """The sample's first member that is sound.

    Raises:
        ValueError: it has none; names the sample and its members.
    """
    for extension, content in sample.members.items():
        if kind_of(extension) == "audio":
            return content
    raise ValueError(f"{sample.shard}: sample {sample.key} has no audio; its members are {', '.join(sample.members)}")


def member_problem(extension: str, content: bytes) -> str | None:
    """Why a member is not of the kind that its extension says, or None where it is or says nothing.

    Images and sound are decoded whole; of a video `CHECKED_FRAMES` frames over its length, and all those before the
    last of them.
    """
    try:
        kind = kind_of(extension)
        if kind == "image":
            load_image(content)
        elif kind == "audio":
            load_audio(content)
        elif kind == "video":
            load_video(content, CHECKED_FRAMES, size=32, whole=True)
        elif kind in ("text", "json"):
            text = content.decode("utf-8")
            if kind == "json":
                json.loads(text)
    except MediaError as error:
        return f"{extension}: {error.reason}"
    except UnicodeDecodeError as error:
        return f"{extension}: not UTF-8: byte {error.start + 1}"
    except (ValueError, RecursionError) as error:
        return f"{extension}: {'not JSON: ' * (kind == 'json')}{error}"
    return None


def sample_problems(sample: Sample) -> list[str]:
    """What is wrong with the members of a sample, one after another; and with its dialog, if its json has `messages`.

    The parts of a dialog may be of any type here: a third party's adapter has its own.
    """
    problems = [
        problem for extension, content in sample.members.items() if (problem := member_problem(extension, content))
    ]
    if "json" in sample.members and not any(problem.startswith("json: ") for problem in problems):
        content = sample.json()
        if isinstance(content, dict) and "messages" in content:
            try:
                dialog_sample(sample, part_types(content["messages"]))
            except ValueError as error:
                problems.append(str(error).removeprefix(f"{sample.shard}: sample {sample.key}: "))
    return problems


def part_types(messages: Any) -> set[str]:
    """The types of the parts in a list of messages that has not been checked."""
    found = set()
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, Mapping) and isinstance(part.get("type"), str):
                found.add(part["type"])
    return found - {"text"}
