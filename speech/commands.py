"""`herdkit transcribe`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.command_line import add_command

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_SECONDS = 0.1


def add_transcribe_command(commands: Any) -> None:
    """Adds `transcribe` to the sub-parsers of `herdkit`."""
    parser = add_command(
        commands,
        "transcribe",
        transcribe,
        "Write down, or translate, what recordings say; the same command goes on where it was stopped.",
        [
            "herdkit transcribe runs/tiny-herd/model talks/ --out talks.jsonl --words --srt subtitles/",
            "herdkit transcribe runs/tiny-herd/model 'data/calls-*.tar' --out calls.jsonl --report calls.html",
            "arecord -q -f S16_LE -r 16000 -c 1 -t raw | herdkit transcribe runs/tiny-herd/model -",
        ],
        details="Recordings are cut at silences; where nobody speaks the model is not asked. Lines of the result have\n"
        "a status: ok, no speech, empty (the model says nothing), or error. Of samples in shards the member txt is\n"
        "kept as the reference, for --report.",
    )
    add = parser.add_argument
    add("model", type=Path, help="model directory")
    add(
        "recordings",
        nargs="+",
        metavar="AUDIO",
        help="files, folders, shards (.tar), or - for raw PCM on stdin",
    )
    add("--out", type=Path, metavar="FILE", help=".jsonl to write; not for -")
    add("--language", default="English", help="that is spoken, or with --translate that is written (%(default)s)")
    add("--translate", action="store_true", help="translate into the language")
    add("--by", choices=("answer", "ctc"), default="answer", help="the language model's answer, or the CTC head")
    add("--words", action="store_true", help="with the times of words")
    add("--batch-size", type=int, default=16, help="segments that run together (%(default)s)")
    add("--max-seconds", type=float, help="of a segment (30, or what the model takes)")
    add("--min-silence", type=float, default=0.4, help="seconds that end a segment of a stream (%(default)s)")
    add("--max-new-tokens", type=int, help="of a segment (16, and 16 a second)")
    add("--srt", type=Path, metavar="FOLDER", help="write subtitles as well")
    add("--vtt", type=Path, metavar="FOLDER", help="likewise")
    add("--report", type=Path, metavar="FILE", help="page with errors against references, spectrograms, the worst ones")
    add("--questions", action="store_true", help="samples are spoken questions: their answers on the page as well")
    add("--rate", type=int, default=16_000, help="of raw PCM, 16 bits, mono, little-endian (%(default)s)")


def transcribe(options: argparse.Namespace) -> None:
    """`herdkit transcribe`."""
    piped = options.recordings == ["-"]
    if not piped and "-" in options.recordings:
        raise ValueError("- is standard input, and stands alone")
    if piped and any(getattr(options, name) is not None for name in ("out", "srt", "vtt", "report")):
        raise ValueError("what comes from standard input is written to standard output; leave the other files out")
    if not piped and options.out is None:
        raise ValueError("--out FILE is needed")
    if options.questions and (options.report is None or options.translate):
        raise ValueError("--questions goes with --report FILE, which shows their answers, and without --translate")
    from ..adapters.model_directory import load
    from .segments import SegmentConfig
    from .transcribe import Transcriber, TranscriptionConfig
    from .transcribe_files import find_recordings, transcribe_files

    recordings = [] if piped else find_recordings(options.recordings)  # before the model, which takes longer
    model = load(options.model, adapters=["speech"])
    most: float = model.adapters["speech"].config.max_seconds
    longest = min(30.0, most) if options.max_seconds is None else options.max_seconds
    segments = SegmentConfig(max_seconds=longest, min_silence=options.min_silence)
    names = ("language", "translate", "by", "words", "batch_size", "max_new_tokens")
    config = TranscriptionConfig(segments=segments, **{name: getattr(options, name) for name in names})
    transcriber = Transcriber(model, config)
    if piped:
        for segment in transcriber.stream(pcm_blocks(sys.stdin.buffer, options.rate), options.rate):
            print(json.dumps(segment.as_json(), ensure_ascii=False), flush=True)
        return
    subtitles = {kind: getattr(options, kind) for kind in ("srt", "vtt") if getattr(options, kind) is not None}
    settings = {"model": str(options.model.resolve())}
    result = transcribe_files(transcriber, recordings, options.out, settings=settings, subtitles=subtitles)
    if options.report is not None:
        from .report import write_report

        result["report"] = str(options.report)
        result |= write_report(options.out, recordings, transcriber, options.report, questions=options.questions)
    print(json.dumps(result))
    if failed := result["error"] + result["empty"]:
        raise ValueError(f"{failed} of {len(recordings)} recordings have no transcript; {options.out} says why")


def pcm_blocks(file: Any, rate: int) -> Iterator[Tensor]:
    """Raw PCM of 16 bits, mono, little-endian, as (n,) float32 in -1..1, about every tenth of a second.

    Raises:
        ValueError: it ends in the middle of a sample, or is no PCM at all but a file in some format.
    """
    import numpy as np
    import torch

    size, first = 2 * max(1, round(rate * _BLOCK_SECONDS)), True
    rest = b""
    while chunk := file.read1(size) if hasattr(file, "read1") else file.read(size):
        chunk = rest + chunk
        if first and chunk[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM", b"\x1aE\xdf\xa3"):
            raise ValueError("standard input holds a file, not raw PCM; give the file's name, or decode it first")
        rest, first = chunk[len(chunk) // 2 * 2 :], False
        yield torch.from_numpy(np.frombuffer(chunk[: len(chunk) // 2 * 2], dtype="<i2").astype(np.float32) / 32768)
    if rest:
        raise ValueError("standard input ends in the middle of a sample; is it PCM of 16 bits?")
