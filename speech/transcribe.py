"""Recordings to text: cut at silences, many at once, with the times of segments and words.

What a recording holds is said by its `status`: "ok"; "no speech", where nobody speaks, so that the model is not asked
and cannot make anything up; "empty", where somebody speaks and the model says nothing; "error", with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torchaudio
from torch import Tensor

from ..adapters.chat import decoder, encode_prompts
from ..adapters.compose import ComposedModel
from ..data.media import MediaError, load_audio
from ..text.generate import generate
from ..text.sampling import SamplingOptions
from .adapter import SpeechAdapter
from .alignment import AlignmentError, Word, align_words
from .prompts import transcription_dialog, translation_dialog
from .segments import Segment, SegmentConfig, Segmenter, find_segments

CLIPPED = 0.999
"""Of full scale, from which on a sample counts as clipped; more than `CLIPPED_SHARE` of them are worth a warning."""
CLIPPED_SHARE = 1e-3
_SPARE_TOKENS, _TOKENS_PER_SECOND = 16, 16


@dataclass(kw_only=True)
class TranscriptionConfig:
    """
    Args:
        language: that is spoken, or with `translate` that is to be written; one of `prompts.LANGUAGES`.
        translate: into `language`, from whatever is spoken.
        by: "answer" asks the language model, as the paper does; "ctc" reads the encoder's CTC head, greedily, which is
            faster and knows no words.
        words: find when each word is said, with the CTC head.
        batch_size: segments that run together.
        held_seconds: of speech that wait in memory to run in batches of like length, at least one segment; beside them
            stands one recording as a whole.
        max_new_tokens: of a segment; None: 16 and 16 more for every second, which no speech reaches. A text that is
            longer is cut, and says so.
        segments: where recordings are cut; None: into pieces of at most 30 s, or what the speech adapter takes.
    """

    language: str = "English"
    translate: bool = False
    by: Literal["answer", "ctc"] = "answer"
    words: bool = False
    batch_size: int = 16
    held_seconds: float = 1800.0
    max_new_tokens: int | None = None
    segments: SegmentConfig | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.held_seconds <= 0:
            raise ValueError(f"held_seconds must be positive, not {self.held_seconds}")
        if self.by not in ("answer", "ctc"):
            raise ValueError(f"by must be answer or ctc, not {self.by!r}")
        if self.translate and (self.words or self.by == "ctc"):
            raise ValueError("a translation is not said in the recording: leave out words and by='ctc'")
        self.messages(b"")  # checks the language

    def messages(self, audio: Any) -> list[dict[str, Any]]:
        """The dialog that asks for the text of a recording."""
        make = translation_dialog if self.translate else transcription_dialog
        return make(audio, self.language)


@dataclass
class TextSegment:
    """What is said from `start` to `end` seconds of a recording. `cut`: the text reached `max_new_tokens`. `words` is
    None where they were not asked for, or the text has more letters than the recording can hold."""

    start: float
    end: float
    text: str
    cut: bool = False
    words: list[Word] | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values, without what was not asked for or is not so."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


@dataclass
class Transcript:
    """What a recording says; `status` as at the top of the file, and `error` its reason."""

    status: Literal["ok", "no speech", "empty", "error"]
    seconds: float = 0.0
    segments: list[TextSegment] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def text(self) -> str:
        """The texts of all segments, one after another."""
        return " ".join(segment.text for segment in self.segments if segment.text)

    def as_json(self) -> dict[str, Any]:
        """JSON values, without what was not asked for or is not there."""
        line: dict[str, Any] = {"status": self.status}
        if self.error is not None:
            return line | {"error": self.error}
        line |= {"seconds": round(self.seconds, 3), "text": self.text}
        line["segments"] = [segment.as_json() for segment in self.segments]
        return line | ({"warnings": self.warnings} if self.warnings else {})


class Transcriber:
    """
    Args:
        model: with a speech adapter and a tokenizer.
        config: what is wanted.

    Raises:
        ValueError: no speech adapter; words or by="ctc" are wanted and the adapter has no CTC head for bytes.
    """

    def __init__(self, model: ComposedModel, config: TranscriptionConfig | None = None):
        self.model, self.config = model, config or TranscriptionConfig()
        adapter = model.adapters.get("speech")
        if not isinstance(adapter, SpeechAdapter):
            raise ValueError(f"the model has no speech adapter; it has {list(model.adapters) or 'no adapters'}")
        if (self.config.words or self.config.by == "ctc") and adapter.config.ctc_classes != 257:
            raise ValueError(
                "the speech adapter has no CTC head for bytes, which the times of words and by='ctc' are read off; "
                "train it with a ctc_weight"
            )
        self.adapter = adapter
        self.sample_rate: int = adapter.config.features.sample_rate
        most = adapter.config.max_seconds
        self.segment_config = self.config.segments or SegmentConfig(max_seconds=min(30.0, most))
        if self.segment_config.max_seconds > most:
            raise ValueError(
                f"segments of {self.segment_config.max_seconds:g} s: the speech adapter takes {most:g} s (max_seconds)"
            )

    def load(self, source: Any) -> Tensor:
        """A path, bytes or a file of audio of any length to (samples,) float32; MediaError for what is none."""
        waveform = load_audio(source, self.sample_rate)
        try:
            self.adapter.config.features.frames(len(waveform))
        except ValueError as error:
            raise MediaError(str(source) if isinstance(source, str) else "audio", error) from None
        return waveform

    def __call__(self, sources: Iterable[Any]) -> list[Transcript]:
        """The transcripts of recordings: paths, bytes, or waveforms (samples,) at `sample_rate`, which are taken one
        after another. What is no recording becomes a transcript with an error."""
        made: list[Transcript] = []
        held: list[tuple[Transcript, Segment, Tensor]] = []
        seconds = 0.0
        for source in sources:
            made.append(Transcript("no speech"))
            for segment, piece in self._pieces(source, made[-1]):
                length = len(piece) / self.sample_rate
                if held and seconds + length > self.config.held_seconds:
                    self._write_down(held)
                    held, seconds = [], 0.0
                held.append((made[-1], segment, piece))
                seconds += length
        self._write_down(held)
        for transcript in made:
            if transcript.segments:
                transcript.status = "ok" if transcript.text else "empty"
        return made

    def _pieces(self, source: Any, transcript: Transcript) -> Iterator[tuple[Segment, Tensor]]:
        """The segments of a recording, copied, so that it does not stay in memory for the sake of one; `transcript` is
        told what is known without asking the model."""
        try:
            waveform = source if isinstance(source, Tensor) else self.load(source)
        except MediaError as error:
            transcript.status, transcript.error = "error", str(error) if isinstance(source, str) else error.reason
            return
        transcript.seconds = len(waveform) / self.sample_rate
        clipped = ((waveform >= CLIPPED) | (waveform <= -CLIPPED)).count_nonzero().item() / max(len(waveform), 1)
        if clipped > CLIPPED_SHARE:
            transcript.warnings.append(f"{clipped:.1%} of the samples are clipped")
        for segment in find_segments(waveform, self.sample_rate, self.segment_config):
            yield segment, waveform[segment.start : segment.end].clone()

    def _write_down(self, held: Sequence[tuple[Transcript, Segment, Tensor]]) -> None:
        texts = self.segments([piece for _, _, piece in held])
        for (transcript, segment, _), found in zip(held, texts, strict=True):
            transcript.segments.append(self._placed(found, segment))

    @torch.inference_mode()
    def segments(self, waveforms: Sequence[Tensor]) -> list[TextSegment]:
        """What is said in each of these, times being from its own beginning; neighbours in length run together."""
        order = sorted(range(len(waveforms)), key=lambda i: -len(waveforms[i]))
        made: dict[int, TextSegment] = {}
        for first in range(0, len(order), self.config.batch_size):
            chosen = order[first : first + self.config.batch_size]
            made |= zip(chosen, self._batch([waveforms[i] for i in chosen]), strict=True)
        return [made[i] for i in range(len(waveforms))]

    def stream(self, blocks: Iterable[Tensor], sample_rate: int | None = None) -> Iterator[TextSegment]:
        """Segments of a recording that is still going on, each once the silence after it has been heard.

        Args:
            blocks: samples (n,) as they come.
            sample_rate: of theirs, a multiple of 100 Hz; None for that of the adapter.
        """
        rate = sample_rate or self.sample_rate
        segmenter, held, first = Segmenter(rate, self.segment_config), torch.zeros(0), 0

        def say(found: list[Segment]) -> Iterator[TextSegment]:
            for segment in found:
                samples = held[segment.start - first : segment.end - first]
                ratio = Fraction(rate, self.sample_rate)
                samples = torchaudio.functional.resample(samples, ratio.numerator, ratio.denominator)
                (text,) = self.segments([samples])
                yield self._placed(text, Segment(round(segment.start / ratio), round(segment.end / ratio)))

        for block in blocks:
            held = torch.cat((held, block.float()))
            yield from say(segmenter.push(block))
            # A segment begins no earlier than its longest length and what the segmenter waits for.
            surplus = len(held) - round((self.segment_config.max_seconds + 5) * rate)
            if surplus > len(held) // 2:
                held, first = held[surplus:], first + surplus
        yield from say(segmenter.finish())

    def _batch(self, waveforms: list[Tensor]) -> list[TextSegment]:
        ends = [len(waveform) / self.sample_rate for waveform in waveforms]
        logits: list[Tensor] = []
        if self.config.words or self.config.by == "ctc":
            device = self.adapter.begin.device
            batch = {name: value.to(device) for name, value in self.adapter.prepare(waveforms).items()}
            encoded, lengths = self.adapter.encode(batch["features"], batch["frames"])
            scores = self.adapter.ctc_logits(encoded)
            logits = [row[:length] for row, length in zip(scores, lengths.tolist(), strict=True)]
        if self.config.by == "ctc":
            spelled = [self.adapter.greedy_bytes(row) for row in logits]
            made = [TextSegment(0.0, end, text) for end, text in zip(ends, spelled, strict=True)]
        else:
            made = [TextSegment(0.0, end, *answer) for end, answer in zip(ends, self._answers(waveforms), strict=True)]
        if self.config.words:
            for segment, row in zip(made, logits, strict=True):
                try:
                    segment.words = align_words(row, segment.text, self.adapter.config.frame_seconds)
                except AlignmentError:
                    segment.words = None
        return made

    def _answers(self, waveforms: list[Tensor]) -> list[tuple[str, bool]]:
        prompts, inputs, tokenizer = encode_prompts(self.model, [self.config.messages(w) for w in waveforms])
        limits = [
            self.config.max_new_tokens or _SPARE_TOKENS + round(_TOKENS_PER_SECOND * len(waveform) / self.sample_rate)
            for waveform in waveforms
        ]
        room = self.model.text.config.max_seq_len - max(map(len, prompts))
        options = SamplingOptions(max_new_tokens=max(1, min(max(limits), room)), stop_ids=tokenizer.stop_ids)
        completions = generate(self.model.text, prompts, options, forward=decoder(self.model, inputs))
        answers = []
        for completion, limit in zip(completions, limits, strict=True):
            # The most probable tokens are the same however many more are made for the others.
            cut = completion.ending == "length" or len(completion.tokens) > limit
            kept = replace(completion, tokens=completion.tokens[:limit])
            answers.append((kept.text(tokenizer, ()).strip(), cut))
        return answers

    def _placed(self, found: TextSegment, segment: Segment) -> TextSegment:
        """The text of a segment at its place in the recording."""
        start, end = (round(at / self.sample_rate, 3) for at in (segment.start, segment.end))
        words = found.words
        if words is not None:
            words = [Word(w.text, round(start + w.start, 3), round(start + w.end, 3), w.score) for w in words]
        return TextSegment(start, end, found.text, found.cut, words)
