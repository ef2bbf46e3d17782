"""Supervised training of the speech encoder and adapter through the frozen language model, on transcription and
spoken dialogue together (section 8.3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.batching import Batch, DialogCollator
from ..adapters.compose import ComposedModel
from ..adapters.contract import Contribution, ModalityBatch
from ..adapters.model_directory import load
from ..adapters.projector import embedding_scale
from ..adapters.stage import AdapterRecipe, train_on_dialogs
from ..data.shards import Sample
from ..text.model_directory import load_part
from ..text.objective import Metrics, token_loss
from ..train.recipe import Stage
from .adapter import SpeechAdapter, SpeechAdapterConfig
from .features import SpecAugmentConfig, spec_augment


@dataclass(kw_only=True)
class SpeechRecipe(AdapterRecipe):
    """
    Args:
        init: model directory; where it has a speech adapter, that one is trained further.
        adapter: sizes of a new speech adapter; None where `init` has one. Its `output_scale` is set to that of
            the language model's token embeddings, and a CTC head is sized for its vocabulary where
            `ctc_weight` is not 0.
        encoder_weights: safetensors file of the encoder pre-trained with BEST-RQ; "" starts it at random.
        ctc_weight: of a CTC loss that predicts the transcript's tokens from the encoder alone. Not in the
            paper: it shortens the way to an encoder that hears words.
        augment: masks of SpecAugment; None for none.
    """

    adapter: SpeechAdapterConfig | None = None
    encoder_weights: str = ""
    ctc_weight: float = 0.0
    augment: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)


@dataclass
class SpeechBatch(Batch):
    """A batch with the transcripts of its utterances, in the order of the speech inputs.

    Args:
        transcripts: (N, L) int64 tokens, padded on the right; transcript_lengths: (N,) int64.
    """

    transcripts: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    transcript_lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def to(self, device) -> SpeechBatch:
        moved = super().to(device)
        transcripts, lengths = self.transcripts.to(device), self.transcript_lengths.to(device)
        return SpeechBatch(moved.rows, moved.inputs, transcripts, lengths)


class SpeechCollator(DialogCollator):
    """Dialogs with one recording each, whose words are the member `txt`."""

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> SpeechBatch:
        """
        Raises:
            ValueError: a sample has no transcript, or not exactly one recording.
        """
        batch = super().__call__(samples)
        tokens = []
        for _, sample in samples:
            if "txt" not in sample.members:
                raise ValueError(f"{sample.shard}: sample {sample.key} has no member 'txt' with its transcript")
            tokens.append(torch.tensor(self.tokenizer.encode(sample.text("txt"))))
        speech = batch.inputs.get("speech")
        if speech is None or speech.placements.input.tolist() != list(range(len(samples))):
            raise ValueError(f"{samples[0][1].shard}: every sample needs exactly one recording")
        lengths = torch.tensor([len(row) for row in tokens])
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return SpeechBatch(batch.rows, batch.inputs, padded, lengths)


@dataclass
class SpeechObjective:
    """Next-token loss of the answers, and `ctc_weight` times the CTC loss of the transcripts. Both are sums over
    tokens; the count is that of the answers' tokens."""

    ctc_weight: float
    augment: SpecAugmentConfig | None

    def __call__(self, model: ComposedModel, batch: SpeechBatch) -> tuple[Tensor, Tensor, Metrics]:
        speech: SpeechAdapter = model.adapters["speech"]  # type: ignore[assignment]
        inputs: ModalityBatch = batch.inputs["speech"]
        features, frames = inputs.tensors["features"], inputs.tensors["frames"]
        if self.augment is not None and speech.training:
            features = spec_augment(features, frames, self.augment)
        encoded, lengths = speech.encode(features, frames)
        given = {"speech": Contribution(soft_tokens=speech.bridge(encoded, lengths)[0])}
        hidden = model.hidden(batch.tokens, batch.inputs, documents=batch.documents, contributions=given)
        loss, count, metrics = token_loss(model.text, hidden, batch.labels)
        if self.ctc_weight:
            # Class 0 is the blank, so that the token t is class t + 1.
            ctc, words = speech.ctc_loss(encoded, lengths, batch.transcripts + 1, batch.transcript_lengths)
            metrics |= {"answer_loss": (loss.detach(), count), "ctc_loss": (ctc.detach(), words)}
            loss = loss + self.ctc_weight * ctc
        return loss, count, metrics


def finetune(recipe: SpeechRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the speech adapter and its encoder on dialogs and writes `run_dir/model`.

    Raises:
        ValueError: `adapter` is given and `init` has one, or the other way round.
    """
    torch.manual_seed(recipe.trainer.seed)
    model = load(recipe.init)
    if (recipe.adapter is None) != ("speech" in model.modalities):
        has = "has" if "speech" in model.modalities else "has no"
        raise ValueError(f"adapter: {recipe.init} {has} speech adapter; give sizes for a new one, and only then")
    if recipe.adapter is not None:
        recipe.adapter.output_scale = embedding_scale(model.text.tok_embeddings.weight)
        if recipe.ctc_weight:
            recipe.adapter.ctc_classes = model.text.config.vocab_size + 1
        adapter = SpeechAdapter(recipe.adapter, model.text.config)
        if recipe.encoder_weights:
            load_part(adapter.encoder, Path(recipe.encoder_weights))
        model.attach(adapter)
    objective = SpeechObjective(recipe.ctc_weight, recipe.augment)
    return train_on_dialogs(recipe, model, run_dir, objective, SpeechCollator)


STAGE = Stage(SpeechRecipe, finetune)
