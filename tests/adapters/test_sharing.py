"""Composed models whose language model is never whole in any process."""

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
        written = tmp_path / name / "big"
        assert (written / "text.safetensors").read_bytes() == (start / "text.safetensors").read_bytes()
        # Nothing was trained, and all processes made the same adapter.
        adapter, other = (load_file(tmp_path / one / "big" / "image.safetensors") for one in (name, "fsdp"))
        assert len(adapter) > 10
        assert adapter.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in adapter.items())
    largest, whole = 8 * MiB, 144 * MiB
    for rank in range(4):
        for found in torch.load(f"{tmp_path}/out.{rank}", weights_only=True):
            print({key: value / MiB for key, value in found.items()})
            kept = found.pop("kept")
            assert 0.9 * whole / 4 < kept < 1.1 * whole / 4
            assert found["read"] < kept + largest + 16 * MiB
            assert found["written"] < 2 * largest + 16 * MiB
