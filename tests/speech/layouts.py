"""Trains a small model on recordings, on a layout after another; a program for `finish_program`."""

import os
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import herdkit
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from herdkit.adapters import ModalityBatch, Placements, compose
from herdkit.adapters.batching import Batch
from herdkit.speech import ConformerConfig, FeatureConfig, SpeechAdapter, SpeechAdapterConfig
from herdkit.speech.finetune import SpeechObjective, SpeechRecipe, finetune
from herdkit.speech.transcript_losses import BYTES, TOKENS, TranscriptLosses, said
from herdkit.text.rows import IGNORE
from herdkit.train import parallel
from herdkit.train.config import load_recipe
from toy_adapters import TEXT, randomise, text_model

TOYS = runpy.run_path(str(Path(__file__).parents[1] / "adapters/layouts.py"))
FOREVER, MELS, PAUSE = torch.iinfo(torch.int64).max, 6, 7
RECORDED = ((0, 1, 2, 4, 6), (2,), ())
"""Rows with a recording, by update: three and two of a micro-batch of four, one, none. Without answers all have one, as
every sample of the recipe has then."""
ADAPTER = SpeechAdapterConfig(
    conformer=ConformerConfig(dim=8, n_layers=1, n_heads=2, ffn_dim=12, conv_kernel=3, n_mels=MELS),
    features=FeatureConfig(n_mels=MELS),
    dim=8, ffn_dim=12, n_heads=2, ctc_classes=257, output_scale=0.5,
)  # fmt: skip
KINDS = {
    "answers": {"weights": (0, 0)},
    "transcripts": {"weights": (0.7, 0.4), "answer_weight": 0.8},
    "words": {"weights": (0, 0.4), "word_temperature": 0.5, "pause": PAUSE},
    "transcripts-alone": {"weights": (0.7, 0.4), "answer_weight": 0.0},
}


def make_model(dtype, weights, answer_weight=1.0, **sizes):
    adapter = randomise(SpeechAdapter(replace(ADAPTER, **sizes), TEXT), seed=2)
    adapter.losses = TranscriptLosses(ctc_weight=weights[0], alignment_weight=weights[1], blank=PAUSE)
    return compose(text_model(), speech=adapter).to(dtype)


def batch_of(rows, update, spelled, aligned, everywhere, dtype):
    texts, found, features, words = TOYS["batch_of"](rows, 0).rows, [], [], []
    for i, row in enumerate(rows):
        if row not in RECORDED[update] and not everywhere:
            continue
        draw = TOYS["draw"](row, update, 5)
        features.append(torch.randn(17 + 3 * row, MELS, dtype=dtype, generator=draw))
        length = ADAPTER.encoder_spec.length(len(features[-1]))
        found.append((i, 2 + row % 2, -(-length // 2) + 2, FOREVER, len(found)))
        words.append(torch.randint(8, 250, (3 + row // 3,), generator=draw).tolist())
        texts.labels[i, : found[-1][1] + found[-1][2]] = IGNORE
    if not found:
        return Batch(texts)
    columns = (torch.tensor(column) for column in zip(*found, strict=True))
    placements = Placements(**dict(zip(("row", "start", "length", "end", "input"), columns, strict=True)))
    frames = torch.tensor([len(one) for one in features])
    tensors = {"features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True), "frames": frames}
    tensors |= said(BYTES, words) if spelled else {}
    tensors |= said(TOKENS, [one[:2] for one in words]) if aligned else {}
    return Batch(texts, {"speech": ModalityBatch(tensors, placements)})


def run(run_dir, layout, kind, dtype="float64", **options):
    settings = KINDS[kind]
    spelled, aligned = (weight > 0 for weight in settings["weights"])
    answer_weight = settings.get("answer_weight", 1.0)
    batches = partial(
        batch_of, spelled=spelled, aligned=aligned, everywhere=answer_weight == 0, dtype=getattr(torch, dtype)
    )
    return TOYS["run"](
        run_dir,
        layout,
        dtype=dtype,
        checkpoint_every=TOYS["STEPS"],
        make_model=partial(make_model, **settings),
        batch_of=batches,
        objective=SpeechObjective(answer_weight=answer_weight),
        **options,
    )


def finetuned(run_dir, overrides):
    """The tiny recipe's mean metrics."""
    recipe = load_recipe(
        Path(herdkit.__file__).parent / "speech/recipes/tiny_transcription.yaml", SpeechRecipe, overrides
    )
    return finetune(recipe, run_dir)["mean"]


def main(runs, run_dir, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        found = {
            name: (finetuned if "overrides" in options else run)(Path(run_dir) / name, **options)
            for name, options in runs.items()
        }
        torch.save(found, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
