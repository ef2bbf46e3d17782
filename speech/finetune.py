"""Supervised training of the speech encoder and adapter through the frozen language model, on transcription,
translation and spoken dialogue together (section 8.3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..adapters.batching import Batch, DialogCollator, DialogEncoder
from ..adapters.compose import ComposedModel
from ..adapters.objective import DialogObjective
from ..adapters.projector import embedding_scale
from ..adapters.stage import AdapterRecipe, initial_model, train_on_dialogs
from ..data.dialogs import Part, dialog_sample
from ..data.media import load_audio
from ..data.shards import Sample
from ..text.objective import token_loss
from ..text.rows import IGNORE, TokenBatch, lay_out
from ..text.tokenizer import Tokenizer
from ..train.objective import Outcome
from ..train.parallel import whole
from ..train.place import Place
from ..train.recipe import Stage
from .adapter import SpeechAdapter, SpeechAdapterConfig
from .augment import WaveformAugmentConfig, augment_waveform
from .ctc import least_frames
from .distil import distillation_loss
from .encoders import load_encoder
from .features import SpecAugmentConfig, spec_augment
from .transcript_losses import BYTES, TOKENS, TranscriptLosses, said

WEIGHTS = ("answer_weight", "ctc_weight", "alignment_weight", "distil_weight")


@dataclass(kw_only=True)
class SpeechRecipe(AdapterRecipe):
    """
    Args:
        init: model directory; where it has a speech adapter, that one is trained further.
        adapter: sizes of a new speech adapter; None where `init` has one. Its `output_scale` is set to that of
            the language model's token embeddings, it gets a CTC head for bytes where `ctc_weight` is not 0, and
            `blank` as its `pause` where it has a `word_temperature` and `alignment_weight` is not 0.
        encoder_weights: safetensors file of the encoder pre-trained with BEST-RQ; of an encoder of transformers, a
            directory in its layout; "" starts it at random.
        answer_weight: of the language model's loss, the paper's only one. At 0 the language model is left out, and
            the CTC losses alone train encoder and adapter, in two thirds of the time; not in a pipeline.
        ctc_weight: of a CTC loss that spells the transcript, in bytes of UTF-8, from the encoder alone.
        alignment_weight: of a CTC loss that reads the transcript's tokens off the soft tokens (`token_logits` of the
            adapter): what is heard comes to the language model as the words that it knows. Neither loss is in the
            paper; both shorten the way by far.
        blank: text of the token that stands where no word is heard, for the alignment; the language model should
            have learned to read past it.
        distil_weight: of the divergence of the language model's answer from the one that it gives to the transcript in
            place of the recording; see `herdkit.speech.distil`. It needs no right answers: with an `answer_weight` of 0
            the dialogs' answers only say over which tokens it is taken. Not with packed rows, nor where processes share
            more than the storage of weights.
        distil_temperature: see there.
        augment: masks of SpecAugment; None for none. They depend on the sample's position in the run alone.
        waveform_augment: speed and noise of the recordings, likewise; None for none.
    """

    adapter: SpeechAdapterConfig | None = None
    encoder_weights: str = ""
    answer_weight: float = 1.0
    ctc_weight: float = 0.0
    alignment_weight: float = 0.0
    blank: str = " ."
    distil_weight: float = 0.0
    distil_temperature: float = 1.0
    augment: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)
    waveform_augment: WaveformAugmentConfig | None = None

    def __post_init__(self):
        for name in WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.distil_temperature <= 0:
            raise ValueError(f"distil_temperature must be positive, not {self.distil_temperature}")
        if self.distil_weight and self.data.packed:
            raise ValueError("distil_weight goes with a row for each sample; set data.packed to false")


@dataclass(kw_only=True)
class SpeechBatch(Batch):
    """A batch with what the losses of the recipe need of the transcripts of its utterances: among the tensors of the
    recordings what is said, see `herdkit.speech.transcript_losses`, and, `written`, the same dialogs with the
    transcripts in place of the recordings."""

    written: TokenBatch | None = None

    def to(self, device) -> SpeechBatch:
        moved = super().to(device)
        return SpeechBatch(rows=moved.rows, inputs=moved.inputs, written=self.written and self.written.to(device))


class SpeechCollator(DialogCollator):
    """Dialogs with recordings. Where a loss needs their words, each dialog has one recording, whose words are the
    member `txt`.

    Args:
        spelled: a CTC loss will spell the words in bytes off the encoder's frames.
        aligned: one will read them in tokens off the soft tokens.
        distilled: the language model will read them as well.
        augment: how recordings are changed, drawn from `seed` and the sample's position.
        masks: what is hidden of their features, drawn likewise.
    """

    def __init__(
        self,
        *given: Any,
        spelled: bool = False,
        aligned: bool = False,
        distilled: bool = False,
        augment: WaveformAugmentConfig | None = None,
        masks: SpecAugmentConfig | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(*given, **options)
        self.spelled, self.aligned, self.distilled = spelled, aligned, distilled
        self.augment, self.masks, self.seed = augment, masks, seed

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> SpeechBatch:
        """
        Raises:
            ValueError: where a loss needs them, a sample has no transcript, not exactly one recording, or more words
                than a CTC loss can read off it.
        """
        samples = [(position, self._augmented(position, sample)) for position, sample in samples]
        batch = super().__call__(samples)
        self._hide(batch, samples)
        if not (self.spelled or self.aligned or self.distilled):
            return SpeechBatch(rows=batch.rows, inputs=batch.inputs)
        for _, sample in samples:
            if "txt" not in sample.members:
                raise ValueError(f"{sample.shard}: sample {sample.key} has no member 'txt' with its transcript")
        speech = batch.inputs.get("speech")
        if speech is None or speech.placements.input.tolist() != list(range(len(samples))):
            raise ValueError(f"{samples[0][1].shard}: every sample needs exactly one recording")
        texts = [sample.text("txt") for _, sample in samples]
        in_tokens, in_bytes = [self.tokenizer.encode(text) for text in texts], [list(text.encode()) for text in texts]
        length = self.ports["audio"].prepare.config.encoder_spec.length  # type: ignore[attr-defined]
        frames = [length(n) for n in speech.tensors["frames"].tolist()]
        soft_tokens = [n - 2 for n in speech.placements.length.tolist()]  # without the vectors around them
        checks = [("bytes", in_bytes, frames)] * self.spelled + [("tokens", in_tokens, soft_tokens)] * self.aligned
        for unit, words, room in checks:
            for (_, sample), one, space in zip(samples, words, room, strict=True):
                if (least := least_frames(one)) > space:
                    raise ValueError(
                        f"{sample.shard}: sample {sample.key}: the transcript needs {least} frames for its {unit}, "
                        f"but the recording has {space}: is it of another text, or cut off?"
                    )
        for wanted, name, rows in ((self.spelled, BYTES, in_bytes), (self.aligned, TOKENS, in_tokens)):
            speech.tensors |= said(name, rows) if wanted else {}
        written = self._written([sample for _, sample in samples], texts) if self.distilled else None
        return SpeechBatch(rows=batch.rows, inputs=batch.inputs, written=written)

    def lengths(self, sample: Sample) -> list[int]:
        """As of `DialogCollator`; the longest that augmentation can make of it."""
        longest = 1.0 if self.augment is None else self.augment.longest
        return [math.ceil(length * longest) for length in super().lengths(sample)]

    def _augmented(self, position: int, sample: Sample) -> Sample:
        if self.augment is None:
            return sample
        rng, prepare = Random(f"{self.seed}/{position}"), self.ports["audio"].prepare
        config: SpeechAdapterConfig = prepare.config  # type: ignore[attr-defined]
        rate = config.features.sample_rate
        longest = math.floor(config.max_seconds * rate)
        members: dict[str, Any] = dict(sample.members)
        for part in (part for message in dialog_sample(sample, tuple(self.ports)) for part in message.media):
            name = next(name for name, content in sample.members.items() if content is part.media)
            members[name] = augment_waveform(load_audio(part.media, rate), rate, self.augment, rng, longest)
        return replace(sample, members=members)

    def _hide(self, batch: Batch, samples: Sequence[tuple[int, Sample]]) -> None:
        """Hides spans of the features of each recording, whatever others it shares a batch with."""
        if self.masks is None or "speech" not in batch.inputs:
            return
        tensors, names = batch.inputs["speech"].tensors, []
        met: set[int] = set()  # each distinct one is in the batch once
        for position, sample in samples:
            messages = (message for dialog in self.dialogs(position, sample) for message in dialog)
            new = {id(part.media) for message in messages for part in message.media if part.type == "audio"} - met
            names += [f"{self.seed}/{position}/{number}" for number in range(len(new))]
            met |= new
        hidden = []
        for name, features, frames in zip(names, tensors["features"], tensors["frames"], strict=True):
            generator = torch.Generator().manual_seed(Random(name).getrandbits(63))
            hidden.append(spec_augment(features[None], frames[None], self.masks, generator))
        tensors["features"] = torch.cat(hidden)

    def _written(self, samples: Sequence[Sample], texts: Sequence[str]) -> TokenBatch:
        encoder, rows = DialogEncoder(self.tokenizer, {}), []
        for sample, words in zip(samples, texts, strict=True):
            messages = dialog_sample(sample, tuple(self.ports))
            for message in messages:
                message.parts = [Part("text", text=words) if part.type == "audio" else part for part in message.parts]
            rows.append([encoder.document(messages, f"{sample.shard}: sample {sample.key}")])
        return lay_out(rows, self.tokenizer.pad_id)


@dataclass(kw_only=True)
class SpeechObjective(DialogObjective):
    """Next-token loss of the answers and divergence from the answers to the written words, weighted as in the recipe
    and summed over tokens, and the losses that the adapter finds by itself."""

    distil_weight: float = 0.0
    distil_temperature: float = 1.0

    @property
    def reads_text(self) -> bool:
        return super().reads_text or self.distil_weight > 0

    def require_fits(self, place: Place) -> None:
        super().require_fits(place)
        if self.distil_weight:
            place.require_storage_alone("distil_weight, which compares the states of two rows,")

    def of_answers(self, model: ComposedModel, hidden: Tensor, batch: Batch) -> Outcome:
        if self.answer_weight:
            answered, count, found = token_loss(model.text, hidden, batch.labels)
            loss, metrics = self.answer_weight * answered, {**found, "answer_loss": (answered.detach(), count)}
        else:
            loss, count, metrics = hidden.new_zeros(()), (batch.labels != IGNORE).sum(), {}
        if self.distil_weight:
            assert isinstance(batch, SpeechBatch)
            assert batch.written is not None
            divergence = self._divergence(model, hidden, batch.labels, batch.written)
            loss = loss + self.distil_weight * divergence
            metrics = {**metrics, "divergence": (divergence.detach(), count)}
        return loss, count, metrics

    def _divergence(self, model: ComposedModel, heard: Tensor, labels: Tensor, written: TokenBatch) -> Tensor:
        with torch.no_grad():
            read = model.text.hidden(written.tokens, documents=written.documents)
        states = heard[labels != IGNORE], read[written.labels != IGNORE]
        return distillation_loss(*states, whole(model.text.output_weight), self.distil_temperature)


def finetune(recipe: SpeechRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the speech adapter and its encoder on dialogs and writes `run_dir/model`.

    Raises:
        ValueError: `adapter` is given and `init` has one, or the other way round; `blank` is not one token; every
            loss has weight 0.
    """
    if not any(getattr(recipe, name) for name in WEIGHTS):
        raise ValueError(f"{', '.join(WEIGHTS)} are all 0: nothing would be learned")
    torch.manual_seed(recipe.trainer.seed)
    model, weights = initial_model(recipe)
    if (recipe.adapter is None) != ("speech" in model.modalities):
        has = "has" if "speech" in model.modalities else "has no"
        raise ValueError(f"adapter: {recipe.init} {has} speech adapter; give sizes for a new one, and only then")
    assert model.tokenizer is not None  # every model directory has one
    blank = blank_token(recipe.blank, model.tokenizer) if recipe.alignment_weight else -1
    if recipe.adapter is not None:
        words = weights.tensor("tok_embeddings.weight", model.text.tok_embeddings.weight)
        model.attach(new_adapter(recipe, recipe.adapter, model, words, blank))
    speech: SpeechAdapter = model.adapters["speech"]  # type: ignore[assignment]
    speech.losses = TranscriptLosses(
        ctc_weight=recipe.ctc_weight, alignment_weight=recipe.alignment_weight, blank=blank
    )
    objective = SpeechObjective(
        answer_weight=recipe.answer_weight,
        distil_weight=recipe.distil_weight,
        distil_temperature=recipe.distil_temperature,
    )
    collator = partial(
        SpeechCollator,
        spelled=recipe.ctc_weight > 0,
        aligned=recipe.alignment_weight > 0,
        distilled=recipe.distil_weight > 0,
        augment=recipe.waveform_augment,
        masks=recipe.augment,
        seed=recipe.trainer.seed,
    )
    return train_on_dialogs(recipe, model, weights, run_dir, objective, collator)


def new_adapter(
    recipe: SpeechRecipe, config: SpeechAdapterConfig, model: ComposedModel, words: Tensor, blank: int
) -> SpeechAdapter:
    """An adapter of these sizes for the model's language model, with what the recipe's losses need; `config` is filled
    in.

    Args:
        words: (V, D), the embedding of the language model.
    """
    config.output_scale = embedding_scale(words)
    if recipe.ctc_weight:
        config.ctc_classes = 1 + 256
    if config.word_temperature is not None and recipe.alignment_weight:
        config.pause = blank
    adapter = SpeechAdapter(config, model.text.config)
    if adapter.words is not None:
        adapter.start_words(words)
    if config.pause is not None:
        assert model.tokenizer is not None
        surround_as_text(adapter, model.tokenizer, words)
    if recipe.encoder_weights:
        load_encoder(adapter.encoder, Path(recipe.encoder_weights))
    return adapter


@torch.no_grad()
def surround_as_text(adapter: SpeechAdapter, tokenizer: Tokenizer, words: Tensor) -> None:
    """Starts the vectors around an utterance as the line breaks before every message's text, and as a pause."""
    assert adapter.config.pause is not None
    breaks = tokenizer.encode("\n\n")[-1]
    for vector, token in ((adapter.begin, breaks), (adapter.end, adapter.config.pause)):
        vector.copy_(words[token] / adapter.config.output_scale)


def blank_token(blank: str, tokenizer: Tokenizer) -> int:
    """
    Raises:
        ValueError: it is not one token.
    """
    tokens = tokenizer.encode(blank)
    if len(tokens) != 1:
        raise ValueError(f"blank: {blank!r} is {len(tokens)} tokens of the language model; give a text of one")
    return tokens[0]


STAGE = Stage(SpeechRecipe, finetune)
