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
from herdkit.adapters.chat import reply_batch
from herdkit.adapters.evaluate import Answer, score
from herdkit.data import ShardReader
from herdkit.speech.evaluate import word_errors
from herdkit.speech.transcribe import Transcriber

BATCH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of the tiny herd")
    parser.add_argument("--count", type=int, default=400)
    options = parser.parse_args()
    model = herdkit.load(options.demo / "model", adapters=["speech"])
    reader = ShardReader(str(options.demo / "data/spoken_questions_heldout_voice/*.tar"))
    samples = [reader[i] for i in range(min(options.count, len(reader)))]
    recordings, words = [sample.members["flac"] for sample in samples], [sample.text("txt") for sample in samples]
    right = [sample.json()["messages"][-1]["content"] for sample in samples]

    def answers(questions: list[Any]) -> list[str]:
        found: list[str] = []
        for first in range(0, len(questions), BATCH):
            dialogs = [[{"role": "user", "content": one}] for one in questions[first : first + BATCH]]
            found += reply_batch(model, dialogs, max_new_tokens=48)
        return found

    started = time.perf_counter()
    direct = answers([[{"type": "audio", "audio": one}] for one in recordings])
    between = time.perf_counter()
    heard = [transcript.text for transcript in Transcriber(model)(recordings)]
    cascade = answers([text or " " for text in heard])
    ended = time.perf_counter()
    routes = {"direct": direct, "cascade": cascade, "true words": answers(words)}
    result: dict[str, Any] = {"count": len(samples)}
    for name, given in routes.items():
        found = score([Answer(i, "", 0, "", *pair) for i, pair in enumerate(zip(right, given, strict=True))])
        result[name] = {"accuracy": round(found.accuracy, 4), "interval": round(found.interval, 4)}
    errors = word_errors(words, heard)
    result["word_errors"] = {"rate": round(errors.rate, 4), "interval": [round(edge, 4) for edge in errors.interval]}
    result["seconds"] = {"direct": round(between - started, 1), "cascade": round(ended - between, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
