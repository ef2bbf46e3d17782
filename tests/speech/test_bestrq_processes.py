"""Targets of BEST-RQ on several processes."""

import io
from pathlib import Path

import pytest
import soundfile
import torch
from herdkit.data.shards import ShardWriter
from herdkit.speech.pretrain import BestRQRecipe
from herdkit.train.config import load_recipe

PROGRAM = Path(__file__).with_name("pretraining.py")
UTTERANCES = 12


@pytest.fixture
def recipe(tmp_path) -> BestRQRecipe:
    """Passes over each recording once; one is longer than a minute and is cropped."""
    with ShardWriter(tmp_path / "data" / "%06d.tar") as writer:
        for i in range(UTTERANCES):
            noise = torch.randn(970_000 if i == 5 else 8_000 + 4_000 * (i % 6))
            file = io.BytesIO()
            soundfile.write(file, 0.1 * noise.numpy(), 16_000, format="WAV")
            writer.write(f"{i}", {"wav": file.getvalue()})
    (tmp_path / "recipe.yaml").write_text(f"""
stage: speech.bestrq
conformer: {{dim: 8, n_layers: 1, n_heads: 2, ffn_dim: 16}}
bestrq: {{n_codebooks: 4, n_codes: 512}}
data:
  sources: [{{shards: '{tmp_path}/data/*.tar', epochs: 1}}]
optimizer: {{lr: 1.0e-2}}
schedule: {{kind: constant}}
trainer: {{steps: 3, batch_size: 4}}
""")
    return load_recipe(tmp_path / "recipe.yaml", BestRQRecipe)


def test_targets_on_two_processes_are_those_on_one(recipe, finish_program, tmp_path):
    found = []
    for processes in (1, 2):
        out = str(tmp_path / f"seen{processes}")
        run_dir = str(tmp_path / f"run{processes}")
        assert finish_program(PROGRAM, processes, recipe=recipe, run_dir=run_dir, out=out) == [0] * processes
        parts = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(processes)]
        assert all(len(part) == UTTERANCES / processes for part in parts), "each process has its own part"
        found.append({digest: targets for part in parts for digest, targets in part.items()})
    one, two = found
    assert {len(targets) for targets in one.values()} >= {1500, 13}
    assert one.keys() == two.keys(), "the same features, crops included"
    assert all(torch.equal(one[digest], two[digest]) for digest in one)
