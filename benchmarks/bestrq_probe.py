"""What BEST-RQ pre-training is worth: how often a linear layer tells from a frozen encoder's frame what letter it is,
with the pre-trained weights and with the random ones that they began as.

    herdkit train speech/recipes/tiny_bestrq.yaml --run-dir runs/bestrq-0 trainer.steps=1000 trainer.seed=0
    python benchmarks/bestrq_probe.py --demo runs/tiny-herd runs/bestrq-0 runs/bestrq-1 runs/bestrq-2

The letters of each frame are those that the demo's own model hears. Fitted to `speech_transcripts`, tested on
`speech_transcripts_heldout_voice`. Prints one JSON line; accuracies are those of the best layer, and of each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import herdkit
import torch
from herdkit.data import ShardReader
from herdkit.data.media import load_audio
from herdkit.speech import Conformer, ConformerConfig, FeatureConfig, SpeechAdapter
from herdkit.speech.probe import LabelledUtterance, label_frames, probe
from herdkit.text.model_directory import dataclass_from_dict, load_part


def recordings(adapter: SpeechAdapter, folder: Path, count: int) -> list[LabelledUtterance]:
    reader = ShardReader(str(folder / "*.tar"))
    samples = (reader[i] for i in range(min(count, len(reader))))
    return [label_frames(adapter, load_audio(sample.members["flac"]), sample.text("txt")) for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of speech.bestrq, one for each seed")
    parser.add_argument("--demo", type=Path, required=True, help="folder of the tiny herd")
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=100)
    options = parser.parse_args()
    speech = herdkit.load(options.demo / "model", adapters=["speech"]).adapters["speech"]
    train = recordings(speech, options.demo / "data/speech_transcripts", options.train)
    test = recordings(speech, options.demo / "data/speech_transcripts_heldout_voice", options.test)
    rows = []
    for run in options.runs:
        kept = json.loads((run / "recipe.json").read_text())
        conformer = dataclass_from_dict(ConformerConfig, kept["conformer"])
        features = dataclass_from_dict(FeatureConfig, kept["features"])
        seed = kept["trainer"]["seed"]
        torch.manual_seed(seed)  # as the stage does: the weights from which it began
        encoder = Conformer(conformer)
        layers = {"random": probe(encoder, train, test, features)}
        load_part(encoder, run / "encoder.safetensors")
        layers["pretrained"] = probe(encoder, train, test, features)
        row = {"seed": seed, **{name: round(max(found), 4) for name, found in layers.items()}}
        row["layers"] = {name: [round(value, 4) for value in found] for name, found in layers.items()}
        rows.append(row)
        print(row, flush=True)
    summary = {name: round(mean(row[name] for row in rows), 4) for name in ("random", "pretrained")}
    print(json.dumps({"accuracy": summary, "seeds": rows}))


if __name__ == "__main__":
    main()
