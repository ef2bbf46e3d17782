"""Composed models whose language model and interleaved layers are never whole in any process."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from herdkit.text import Tokenizer
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("sharing.py")
LAYOUTS = {
    "fsdp": {"shard": 4},
    "tensor-fsdp": {"tensor": 2, "shard": 2},
    "pipeline-fsdp": {"pipeline": 2, "shard": 2},
}
MiB = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_no_process_has_more_than_its_part_and_a_tensor(finish_program, tmp_path):
    tokenizer = Tokenizer.train(["a dog and a cat"], 514)
    small, start = tmp_path / "small", tmp_path / "big"
    draw = [("draw", {"tokenizer": tokenizer, "to": to, "sizes": s}) for to, s in ((small, "SIZES"), (start, "BIG"))]
    assert finish_program(PROGRAM, calls=draw, out=str(tmp_path / "out")) == [0]
    calls = [
        ("measure", {"small": small, "start": start, "to": tmp_path / name, "layout": layout})
        for name, layout in LAYOUTS.items()
    ]
    assert finish_program(PROGRAM, 4, calls=calls, out=str(tmp_path / "out")) == [0] * 4
    for name in LAYOUTS:
        for file in ("text", "image"):
            written = tmp_path / name / "big" / f"{file}.safetensors"
            assert written.read_bytes() == (start / f"{file}.safetensors").read_bytes()
        # Nothing was trained, and all processes of all layouts made the same new adapter.
        adapter, other = (load_file(tmp_path / one / "big" / "video.safetensors") for one in (name, "fsdp"))
        assert len(adapter) > 40
        assert adapter.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in adapter.items())
    layers = [adapter[f"layers.{place}.attention.wv.weight"] for place in (1, 3, 5, 7)]
    assert not any(torch.equal(one, other) for one, other in combinations(layers, 2))
    largest, whole = 16 * MiB, {"text": 144 * MiB, "image": 64 * MiB, "video": 64 * MiB}
    for rank in range(4):
        for (name, layout), found in zip(LAYOUTS.items(), torch.load(f"{tmp_path}/out.{rank}"), strict=True):
            print(name, {key: value if key == "kept" else value / MiB for key, value in found.items()})
            for part, kept in found["kept"].items():
                processes = 4 if part == "text" else 4 // layout.get("tensor", 1)
                assert 0.9 * whole[part] / processes < kept < 1.1 * whole[part] / processes, (name, part)
            assert found["read"] < sum(found["kept"].values()) + largest + 16 * MiB
            assert found["written"] < 2 * largest + 16 * MiB
