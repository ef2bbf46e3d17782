"""Builds the made training and test sets of the demo as shards.

Each set is a folder of tars, `<out>/<set>/000000.tar`, beside a `manifest.json` that is written last: a set
that has one is finished and is not built again. The same seed gives the same bytes (on one version of the
codecs, of espeak-ng and, for English prose, of Python). Sets that end in `_new` or `_heldout` hold only scenes,
clips or documents that no training set holds; `_combinations` asks about colours and shapes never seen together;
`_heldout_voice`, and the voice of `two_senses_heldout`, is one that no training set has. Samples of test sets
carry `kind` and `choices` in their json member, so that chance is the mean of 1 / len(choices).
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..shards import ShardWriter
from . import annealing, languages, samples

VERSION = 10
_JOB = 250
"""Samples of one job. Part of the format: within one job, espeak-ng's samples depend on what it spoke before."""


@dataclass(kw_only=True)
class SetSizes:
    """How much of everything to make.

    Args:
        english_bytes: English prose at most; a Python installation holds about 2 MB of it.
        recitations: texts that repeat a few words.
        dialogues: text dialogues.
        pairs: pictures with partial captions, for contrastive training.
        captions: pictures with captions.
        scenes: pictures with questions.
        clips: videos, each with a caption and with questions.
        transcripts: spoken sentences with their words.
        spoken_questions: spoken questions with their answers.
        two_senses: pictures with a spoken question.
        held_out: samples of every test set.
    """

    english_bytes: int = 2_500_000
    recitations: int = 15_000
    dialogues: int = 24_000
    pairs: int = 10_000
    captions: int = 1_500
    scenes: int = 12_000
    clips: int = 2_400
    transcripts: int = 5_000
    spoken_questions: int = 3_000
    two_senses: int = 2_000
    held_out: int = 400

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Sets that are made together, from the same pictures or sounds.

    Args:
        make: called with the sets, the seed, the range of a job, and both options and settings.
        options: follow from the sets' names.
        settings: do not, and stand in the manifest.
        job: samples of one.
    """

    sets: tuple[str, ...]
    count: int
    make: Callable[..., list[samples.Made]]
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    job: int = _JOB

    def jobs(self) -> Iterator[tuple[int, int]]:
        return ((start, min(start + self.job, self.count)) for start in range(0, self.count, self.job))


def _groups(sizes: SetSizes) -> list[_Group]:
    def group(make: Callable[..., list[samples.Made]], count: int, *sets: str, **options: Any) -> _Group:
        job = count if make is samples.english else _JOB
        return _Group(sets=sets, count=count, make=make, options=options, job=job)

    new = sizes.held_out
    return [
        group(samples.english, sizes.english_bytes, "text_pretrain", "text_pretrain_new"),
        group(samples.recitations, sizes.recitations, "text_recitations"),
        group(samples.dialogues, sizes.dialogues, "text_dialogs"),
        group(samples.new_dialogues, new, "text_dialogs_new"),
        group(samples.pairs, sizes.pairs, "image_pairs"),
        group(samples.captions, sizes.captions, "image_captions", split="train"),
        group(samples.captions, new, "image_captions_new", split="new"),
        group(samples.pictures, sizes.scenes, "image_questions", split="train"),
        group(samples.pictures, new, "image_questions_new", split="new"),
        group(samples.pictures, new, "image_questions_combinations", split="combination"),
        group(samples.videos, sizes.clips, "video_captions", "video_questions", split="train"),
        group(samples.videos, new, "video_captions_new", "video_questions_new", split="new"),
        group(samples.transcripts, sizes.transcripts, "speech_transcripts", split="train"),
        group(samples.transcripts, new, "speech_transcripts_heldout_voice", split="new"),
        group(samples.spoken_questions, sizes.spoken_questions, "spoken_questions", split="train"),
        group(samples.spoken_questions, new, "spoken_questions_heldout_voice", split="new"),
        group(samples.two_senses, sizes.two_senses, "two_senses", split="train"),
        group(samples.two_senses, new, "two_senses_heldout", split="new"),
    ]


def set_names() -> list[str]:
    """The names of all sets, in the order in which they are built."""
    return [name for group in _groups(SetSizes()) for name in group.sets]


def build(
    out_dir: str | Path,
    sizes: SetSizes | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
    only: Iterable[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Builds every set that is not finished.

    Args:
        out_dir: one folder for each set is made in it.
        sizes: default `SetSizes()`.
        seed: the same seed gives the same samples, whatever `workers` is.
        workers: processes that draw, speak and encode; 0 does it in this one. As with all multiprocessing, a
            script that calls this with workers needs the guard `if __name__ == "__main__"`.
        progress: called with (set names, done, total) as each group of sets grows; English counts bytes.
        only: build just the groups that hold these sets.

    Returns:
        For each set: its manifest, and "seconds" where it was built now (for how long it was waited for).

    Raises:
        ValueError: a set is unknown, or was built before with another seed, size or version.
        EspeakError: espeak-ng is not installed and sets of speech are asked for.
    """
    out = Path(out_dir)
    groups = _groups(sizes or SetSizes())
    if only is not None:
        wanted = set(only)
        if unknown := wanted.difference(set_names()):
            raise ValueError(f"no set is named {', '.join(sorted(unknown))}; the sets are {', '.join(set_names())}")
        groups = [group for group in groups if wanted.intersection(group.sets)]
    return _build(out, groups, seed, workers, progress)


def _build(
    out: Path,
    groups: list[_Group],
    seed: int,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    todo = []
    for group in groups:
        finished = {name: _finished(out / name, group, seed) for name in group.sets}
        if None in finished.values():
            todo.append(group)
        else:
            made.update((name, manifest) for name, manifest in finished.items() if manifest is not None)
    with ExitStack() as stack:
        submit: Callable[..., Any] = _Now
        if workers and todo:
            # Fresh processes: a fork would take the parent's threads' locks with it.
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            submit = pool.submit
        pending = [
            [
                (stop, submit(group.make, group.sets, seed, start, stop, **group.options, **group.settings))
                for start, stop in group.jobs()
            ]
            for group in todo
        ]
        for group, jobs in zip(todo, pending, strict=True):
            made.update(_write(out, group, jobs, seed, progress))
    return {name: made[name] for group in groups for name in group.sets}


class _Now:
    """A job that runs in this process when its result is asked for."""

    def __init__(self, function: Callable[..., list[samples.Made]], *args: Any, **options: Any):
        self._call = function, args, options

    def result(self) -> list[samples.Made]:
        function, args, options = self._call
        return function(*args, **options)


def build_languages(
    out_dir: str | Path,
    counts: dict[str, int],
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Builds the sets of `herdkit.data.synthetic.languages` that `counts` names (`written`, `spoken`, `spoken_new`) and
    that are not finished, with so many samples; the rest as for `build`."""
    make: dict[str, tuple[Callable[..., list[samples.Made]], dict[str, Any]]] = {
        "written": (languages.written, {}),
        "spoken": (languages.spoken, {"split": "train"}),
        "spoken_new": (languages.spoken, {"split": "new"}),
    }
    groups = [
        _Group(sets=(name,), count=count, make=make[name][0], options=make[name][1]) for name, count in counts.items()
    ]
    return _build(Path(out_dir), groups, seed, workers, progress)


def build_annealing(
    out_dir: str | Path,
    counts: Mapping[str, int],
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    held_out: bool = False,
    side: int = 336,
) -> dict[str, dict[str, Any]]:
    """Builds the sets of the kinds (of `herdkit.data.synthetic.annealing.KINDS`) that `counts` names and that are not
    finished, with so many pictures of each; the rest as for `build`.

    Args:
        held_out: the test sets, whose names end in `_new`, of those kinds that hold something out.
        side: of charts, tables, equations, flowcharts and paragraphs, in pixels.

    Raises:
        ValueError: a kind is unknown, or holds nothing out and `held_out` is asked for; or as for `build`.
        BrowserError: there is no browser to draw screenshots with.
    """
    groups = []
    for name, count in counts.items():
        if name not in annealing.KINDS:
            raise ValueError(f"no kind is named {name!r}; the kinds are {', '.join(annealing.KINDS)}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
        kind = annealing.KINDS[name]
        if held_out and not kind.split:
            splitting = ", ".join(name for name, kind in annealing.KINDS.items() if kind.split)
            raise ValueError(f"{name} hold nothing out for tests; {splitting} do")
        groups.append(
            _Group(
                sets=tuple(f"{made}_new" if held_out else made for made in kind.sets),
                count=count,
                make=kind.make,
                options={**kind.options, **({"split": "new" if held_out else "train"} if kind.split else {})},
                settings={"side": side} if kind.sized else {},
                job=kind.job,
            )
        )
    return _build(Path(out_dir), groups, seed, workers, progress)


def _write(
    out: Path,
    group: _Group,
    jobs: list[tuple[int, Future[list[samples.Made]] | _Now]],
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    started = time.perf_counter()
    counts = dict.fromkeys(group.sets, 0)
    with ExitStack() as stack:
        writers = {}
        for name in group.sets:
            writer = ShardWriter(out / name / "%06d.tar", max_count=5000, max_bytes=1 << 28, existing="replace")
            writers[name] = stack.enter_context(writer)
        jobs.reverse()
        while jobs:  # popped, so that what is written is freed
            stop, job = jobs.pop()
            for name, key, members in job.result():
                writers[name].write(key, members)
                counts[name] += 1
            if progress is not None:
                progress(" + ".join(group.sets), stop, group.count)
    seconds = time.perf_counter() - started
    manifests = {}
    for name in group.sets:
        manifest = _manifest(group, seed) | {"samples": counts[name]}
        draft = out / name / "manifest.json.part"
        draft.write_text(json.dumps(manifest, indent=1) + "\n")
        draft.rename(out / name / "manifest.json")
        manifests[name] = manifest | {"seconds": round(seconds, 2)}
    return manifests


def _manifest(group: _Group, seed: int) -> dict[str, Any]:
    return {"version": VERSION, "seed": seed, "size": group.count, **group.settings}


def _finished(folder: Path, group: _Group, seed: int) -> dict[str, Any] | None:
    """The manifest, or None if the set has to be built."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    for key, value in _manifest(group, seed).items():
        if manifest.get(key) != value:
            raise ValueError(
                f"{folder} was built with {key} {manifest.get(key)}, now {value} is asked for; "
                "delete it or choose another folder"
            )
    return manifest
