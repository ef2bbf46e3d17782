"""Spoken questions answered directly and by the cascade (write them down, then answer the words), by one model.

    python benchmarks/cascade.py --demo runs/tiny-herd [--count 400]

The questions are the demo's held-out ones, in its held-out voice. Prints one JSON line: the share of exact answers of
each route with its 95% interval, that of the answers to the true words, and the word errors of the transcripts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import herdkit
from herdkit.data import ShardReader
from herdkit.speech.evaluate import word_errors
from herdkit.speech.questions import SpokenAnswers, ask, in_words, scores, spoken_question
from herdkit.speech.transcribe import Transcriber, TranscriptionConfig

BATCH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of the tiny herd")
    parser.add_argument("--count", type=int, default=400)
    options = parser.parse_args()
    transcriber = Transcriber(
        herdkit.load(options.demo / "model", adapters=["speech"]), TranscriptionConfig(batch_size=BATCH)
    )
    reader = ShardReader(str(options.demo / "data/spoken_questions_heldout_voice/*.tar"))
    samples = [reader[i] for i in range(min(options.count, len(reader)))]
    questions, said = [spoken_question(sample) for sample in samples], [sample.text("txt") for sample in samples]
    prompts = [question.prompt for question in questions]

    started = time.perf_counter()
    given = {"direct": ask(transcriber, prompts)}
    between = time.perf_counter()
    heard = [transcript.text for transcript in transcriber([prompt[-1].media[0].media for prompt in prompts])]
    given["cascade"] = ask(transcriber, [in_words(*pair) for pair in zip(prompts, heard, strict=True)])
    ended = time.perf_counter()
    given["written"] = ask(transcriber, [in_words(*pair) for pair in zip(prompts, said, strict=True)])
    answered = [
        SpokenAnswers(sample.key, question.answers, said[i], heard[i], {name: given[name][i] for name in given})
        for i, (sample, question) in enumerate(zip(samples, questions, strict=True))
    ]
    result: dict[str, Any] = {"count": len(samples)}
    for name, mean in scores(answered).items():
        result[name] = {"accuracy": round(mean.score, 4), "interval": round(mean.interval, 4)}
    errors = word_errors(said, heard)
    result["word_errors"] = {"rate": round(errors.rate, 4), "interval": [round(edge, 4) for edge in errors.interval]}
    result["seconds"] = {"direct": round(between - started, 1), "cascade": round(ended - between, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
