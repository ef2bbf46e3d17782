"""What BEST-RQ pre-training is worth: character errors of a linear layer that learns to spell from a frozen encoder,
with the pre-trained weights and with the random ones that they began as.

    herdkit train speech/recipes/tiny_bestrq.yaml --run-dir runs/bestrq-0 trainer.steps=1000 trainer.seed=0
    python benchmarks/bestrq_probe.py --data runs/tiny-herd/data runs/bestrq-0 runs/bestrq-1 runs/bestrq-2

Trained on `speech_transcripts`, tested on `speech_transcripts_heldout_voice`. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from herdkit.data import ShardReader
from herdkit.data.media import load_audio
from herdkit.speech import Conformer, ConformerConfig, FeatureConfig
from herdkit.speech.probe import ProbeConfig, probe
from herdkit.text.model_directory import dataclass_from_dict, load_part


def recordings(folder: Path, count: int) -> list[tuple[torch.Tensor, str]]:
    reader = ShardReader(str(folder / "*.tar"))
    samples = (reader[i] for i in range(min(count, len(reader))))
    return [(load_audio(sample.members["flac"]), sample.text("txt")) for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of speech.bestrq, one for each seed")
    parser.add_argument("--data", type=Path, required=True, help="of the tiny herd")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    train = recordings(options.data / "speech_transcripts", options.train)
    test = recordings(options.data / "speech_transcripts_heldout_voice", options.test)
    rows = []
    for run in options.runs:
        kept = json.loads((run / "recipe.json").read_text())
        conformer = dataclass_from_dict(ConformerConfig, kept["conformer"])
        features = dataclass_from_dict(FeatureConfig, kept["features"])
        seed = kept["trainer"]["seed"]
        config = ProbeConfig(steps=options.steps, seed=seed, features=features)
        torch.manual_seed(seed)  # as the stage does: the weights from which it began
        encoder = Conformer(conformer)
        row = {"seed": seed, "random": probe(encoder, train, test, config).rate}
        load_part(encoder, run / "encoder.safetensors")
        row["pretrained"] = probe(encoder, train, test, config).rate
        rows.append(row)
        print(row, flush=True)
    summary = {name: round(mean(row[name] for row in rows), 4) for name in ("random", "pretrained")}
    print(json.dumps({"character_error_rate": summary, "seeds": rows}))


if __name__ == "__main__":
    main()
