"""Four languages and four directions of translation, spoken: a tiny language model that can repeat and translate
written sentences stays frozen, and a speech encoder and adapter are trained to hear for it.

python -m herdkit.demos.multilingual --out runs/multilingual

Voices and sentences of the test are held out. The direct route (speech to translation) is measured beside the cascade
(speech to transcript to translation, by the same model), transcription beside the CTC head of the same encoder and
beside an encoder of the same size that was trained by CTC alone. A killed run goes on from its last finished point.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..adapters.chat import reply_batch
from ..adapters.compose import ComposedModel
from ..adapters.model_directory import load
from ..data.shards import Sample, ShardReader
from ..data.synthetic.languages import DIRECTIONS, LANGUAGES
from ..data.synthetic.sets import build_languages
from ..speech.evaluate import bleu, word_errors
from ..speech.prompts import translation_prompt
from ..speech.transcribe import Transcriber, TranscriptionConfig
from ..train.config import load_recipe
from ..train.files import write_json
from ..train.recipe import StageRecipe
from .chain import Chain, Link

CHAIN = (
    Link(
        name="text-pretrain",
        title="language model: sentences",
        recipe="text/recipes/tiny_multilingual_pretrain.yaml",
    ),
    Link(
        name="text-sft",
        title="language model: translation",
        recipe="text/recipes/tiny_multilingual_sft.yaml",
    ),
    Link(
        name="speech-ctc",
        title="speech: an encoder by CTC alone",
        recipe="speech/recipes/tiny_multilingual_ctc.yaml",
    ),
    Link(
        name="speech-transcription",
        title="speech: what is said",
        recipe="speech/recipes/tiny_multilingual_transcription.yaml",
    ),
    Link(
        name="speech-translation",
        title="speech: transcription and translation",
        recipe="speech/recipes/tiny_multilingual_translation.yaml",
    ),
)

ROUTES = ("answer", "ctc_head", "ctc_only")
"""How speech is written down: by the language model, by the CTC head of its encoder, by the encoder trained by CTC."""


def run(out: Path, seed: int = 0, *, written: int = 20_000, spoken: int = 5_000, held_out: int = 400) -> dict[str, Any]:
    """Makes the data, trains the chain and examines its model.

    Args:
        out: folder of data, stages and results.
        seed: of data, weights and order.
        written, spoken, held_out: sentences of each set.
    """
    console, started = Console(stderr=True), time.monotonic()
    build_languages(out / "data", {"written": written, "spoken": spoken, "spoken_new": held_out}, seed)
    given = [f"root={out}", f"trainer.seed={seed}", f"data.seed={seed}"]

    def recipe(link: Link) -> StageRecipe:
        return load_recipe(link.path, link.stage.recipe, given)

    Chain(CHAIN, out / "stages", recipe, console, before_training=lambda: None).train()
    model, ctc_only = (load(out / "stages" / name / "model") for name in ("speech-translation", "speech-ctc"))
    reader = ShardReader(str(out / "data" / "spoken_new" / "*.tar"))
    results = {"seed": seed, **examine(model, ctc_only, [reader[i] for i in range(len(reader))])}
    encoder = {name: value for name, value in model.named_parameters() if name.startswith("speech.encoder.")}
    results["parameters"] = {"model": count(model.parameters()), "encoder": count(encoder.values())}
    results["seconds"] = round(time.monotonic() - started)
    write_json(out / "results.json", results)
    return results


def examine(model: ComposedModel, ctc_only: ComposedModel, samples: list[Sample]) -> dict[str, Any]:
    """Word errors of transcripts by language, and BLEU of translations by direction, of each route. `ctc_only` is the
    model of which the encoder and its CTC head alone are asked."""
    of_language = {
        language: [sample for sample in samples if sample.json()["language"] == language] for language in LANGUAGES
    }
    said, heard = {}, {}
    for language, chosen in of_language.items():
        recordings = [sample.members["flac"] for sample in chosen]
        said[language] = [sample.text("txt") for sample in chosen]
        answer = TranscriptionConfig(language=language)
        routes = {
            "answer": Transcriber(model, answer),
            "ctc_head": Transcriber(model, replace(answer, by="ctc")),
            "ctc_only": Transcriber(ctc_only, replace(answer, by="ctc")),
        }
        heard[language] = {name: [found.text for found in route(recordings)] for name, route in routes.items()}
    said["all"] = [text for texts in said.values() for text in texts]
    heard["all"] = {name: [text for texts in heard.values() for text in texts[name]] for name in ROUTES}
    transcription = {
        language: {"count": len(texts)}
        | {
            name: {"word_error_rate": errors.rate, "interval": errors.interval}
            for name in ROUTES
            for errors in [word_errors(texts, heard[language][name])]
        }
        for language, texts in said.items()
    }
    translation = {}
    for source, target in DIRECTIONS:
        chosen = of_language[source]
        right = [sample.json()["translation"][target] for sample in chosen]
        config = TranscriptionConfig(language=target, translate=True)
        direct = [found.text for found in Transcriber(model, config)([sample.members["flac"] for sample in chosen])]
        routes = {
            "direct": direct,
            "cascade": translated(model, heard[source]["answer"], target),
            "written": translated(model, said[source], target),
        }
        translation[f"{source} to {target}"] = {
            name: {
                "bleu": found.score,
                "interval": found.interval,
                "exact": sum(a == b for a, b in zip(right, texts, strict=True)) / len(right),
            }
            for name, texts in routes.items()
            for found in [bleu(right, texts, target)]
        }
    return {"transcription": transcription, "translation": translation}


def translated(model: ComposedModel, texts: list[str], language: str) -> list[str]:
    """Written sentences, translated by the language model."""
    dialogs = [
        [{"role": "system", "content": translation_prompt(language)}, {"role": "user", "content": text or " "}]
        for text in texts
    ]
    return [answer.strip() for answer in reply_batch(model, dialogs, max_new_tokens=32)]


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/multilingual"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = run(options.out.resolve(), options.seed)
    for language, row in results["transcription"].items():
        rates = {name: row[name]["word_error_rate"] for name in ROUTES}
        print(
            f"{language}: word errors {rates['answer']:.1%}, by the CTC head {rates['ctc_head']:.1%}, "
            f"by an encoder trained by CTC alone {rates['ctc_only']:.1%}"
        )
    for direction, row in results["translation"].items():
        print(f"{direction}: BLEU " + ", ".join(f"{name} {found['bleu']:.1f}" for name, found in row.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
