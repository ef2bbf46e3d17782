"""`herdkit shards show`: its dialogs are shown as the chat format and the adapters make them, so it lives here."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.byte_cache import ByteCache
from ..data.command_line import add_command
from ..data.drafts import Problem
from ..data.index_command import add_cache_options
from ..data.media_check import kind_of, member_problem
from ..data.shard_survey import as_text, damaged_samples, histogram, survey_shards
from ..data.shards import Sample, ShardError, ShardReader
from ..data.wording import byte_size, counted, printable
from ..train.files import write_bytes
from ..train.progress import ProgressLine
from .sample_tokens import SampleEncoder, TokenLengths, token_lengths

SHOWN_PROBLEMS = 20


def add_show_command(group: Any) -> None:
    """Adds `show` to the sub-parsers of `herdkit shards`."""
    parser = add_command(
        group,
        "show",
        show,
        "Say what is in shards, and make pictures of the first samples: images, clips, spectrograms, dialogs.",
        [
            "herdkit shards show 'data/train-*.tar' --out look/",
            "herdkit shards show data/chats/ --tokenizer runs/tiny-herd/model --out look/",
            "herdkit shards show data/chats/ --sample 000017",
        ],
        interrupted="nothing was changed",
    )
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="files, folders, URLs, or patterns: 'data/train-{000..011}.tar'")
    add("--out", type=Path, metavar="FOLDER", help="for images.png, videos.png, audio.png and dialogs.html")
    add("--count", type=int, default=15, metavar="N", help="the first samples, which are shown (%(default)s)")
    add("--sample", metavar="KEY", help="show this one instead, with its text")
    add("--tokenizer", metavar="MODEL", help="model directory: lengths in tokens, and dialogs with what counts marked")
    add("--measure", type=int, default=1000, metavar="N", help="samples measured in tokens (%(default)s); 0 for all")
    add("--check", action="store_true", help="decode every member of every sample, not of those shown alone")
    add_cache_options(parser)


def show(options: argparse.Namespace) -> None:
    """`herdkit shards show`."""
    if options.count < 1 or options.measure < 0:
        raise ValueError(f"--count must be at least 1 and --measure 0, not {options.count} and {options.measure}")
    encode = None if options.tokenizer is None else SampleEncoder(options.tokenizer)
    cache = ByteCache(options.cache_folder, options.cache_bytes)
    found = survey_shards(options.shards, cache)
    if not found.shards:
        _print_damaged(found.damaged)
        raise ShardError(f"no shard of {len(found.damaged)} can be read; the first: {found.damaged[0]}")
    print(as_text(found))
    reader = ShardReader(found.shards, on_fault="skip", cache=cache)
    first = range(min(options.count, len(reader)))
    shown = _Samples(reader, first if options.sample is None else [reader.find(options.sample)])
    print()
    for sample in shown:
        sizes = ", ".join(f"{printable(name)} {byte_size(len(value))}" for name, value in sample.members.items())
        print(f"{printable(sample.key)}: {sizes}")
        if options.sample is not None:
            _print_text(sample)
    checked = _Samples(reader, range(len(reader))) if options.check else shown
    with ProgressLine("checking", len(checked), silent=not options.check) as line:
        damaged = found.damaged + list(damaged_samples(checked, lambda done: line.update(done, "")))
    result: dict[str, Any] = {"shards": len(found.shards), "samples": found.samples}
    result["bytes"] = sum(spread.total for spread in found.members.values())
    if encode is not None and len(reader):
        count = min(options.measure or len(reader), len(reader))
        measured = _Samples(reader, [place * len(reader) // count for place in range(count)])
        with ProgressLine("counting tokens", count) as line:
            kinds, problems = token_lengths(measured, encode, lambda done: line.update(done, ""))
        _print_lengths(kinds, "" if count == len(reader) else f"; {counted(count, 'sample')} evenly spread over all")
        names = ("count", "total", "least", "median", "most")
        result["tokens"] = {
            kind: {name: getattr(one.lengths, name) for name in names} | {"in_loss": one.in_loss}
            for kind, one in kinds.items()
        }
        known = {(problem.where, problem.key) for problem in damaged}
        damaged += [problem for problem in problems if (problem.where, problem.key) not in known]
    _print_damaged(damaged)
    result["damaged"] = len(damaged)
    if options.out is not None:
        result["files"] = [str(path) for path in _write(options.out, shown, encode, damaged)]
    print(json.dumps(result))


class _Samples:
    """Some samples of a reader, read anew each time they are gone through."""

    def __init__(self, reader: ShardReader, places: Sequence[int]):
        self.reader, self.places = reader, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Sample]:
        return (self.reader[place] for place in self.places)


def _print_text(sample: Sample) -> None:
    for extension, content in sample.members.items():
        kind = kind_of(extension)
        if kind in ("text", "json"):
            text = content.decode("utf-8", "backslashreplace")
            if kind == "json" and member_problem(extension, content) is None:
                text = json.dumps(json.loads(text), ensure_ascii=False, indent=2)
            print(f"\n--- {printable(extension)}")
            print("\n".join(printable(line.replace("\t", "    ")) for line in text.splitlines()))


def _print_lengths(kinds: dict[str, TokenLengths], which: str) -> None:
    for kind, found in kinds.items():
        lengths = found.lengths
        print(
            f"\ntokens of a {kind}: {lengths.least:,} to {lengths.most:,}, half of them up to {lengths.median:,}{which}"
        )
        print("\n".join(histogram(lengths)))
        print(f"  {found.in_loss / max(lengths.total, 1):.1%} of the tokens count in the loss")
        if found.stand_ins:
            print(f"  no adapter for {', '.join(found.stand_ins)} was given: each of those counts as one token")


def _print_damaged(damaged: list[Problem]) -> None:
    if damaged:
        print("\ndamaged")
    for problem in damaged[:SHOWN_PROBLEMS]:
        print(f"  {problem}")
    if len(damaged) > SHOWN_PROBLEMS:
        print(f"  ... and {len(damaged) - SHOWN_PROBLEMS:,} more, all of which --out FOLDER keeps")


def _write(folder: Path, shown: _Samples, encode: SampleEncoder | None, damaged: list[Problem]) -> list[Path]:
    """The files that there is something for, and no older ones of the same names beside them."""
    from ..data.contact_sheet import audio_sheet, image_sheet, video_sheet  # with matplotlib, which takes its time
    from .dialog_page import dialog_page

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def write(name: str, content: bytes | None) -> None:
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
            return
        write_bytes(path, content)
        written.append(path)
        print(path)

    print()
    for name, draw in (("images.png", image_sheet), ("videos.png", video_sheet), ("audio.png", audio_sheet)):
        picture = draw(shown)
        write(name, None if picture is None else _png(picture))
    page = None if encode is None else dialog_page(shown, encode)
    write("dialogs.html", None if page is None else page.encode())
    lines = "".join(json.dumps(asdict(problem)) + "\n" for problem in damaged)
    write("damaged.jsonl", lines.encode() if lines else None)
    if encode is None and any(kind_of(name) == "json" for sample in shown for name in sample.members):
        print("dialogs are shown with --tokenizer MODEL")
    return written


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
