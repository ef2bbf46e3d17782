import re
from pathlib import Path

import pytest
import torch
from herdkit.train import replicas
from herdkit.train.replicas import bit_hash, replicated_state

FAULTY = Path(__file__).with_name("faulty.py")


def errors(path, processes):
    return [Path(f"{path}.{rank}").read_text() for rank in range(processes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_flipped_bit_changes_the_hash(dtype, monkeypatch):
    monkeypatch.setattr(replicas, "CHUNK", 4)
    tensor = torch.arange(7).to(dtype)
    before = bit_hash(tensor)
    assert before == bit_hash(tensor.clone())
    raw = tensor.view(torch.uint8)
    for place in range(len(raw)):
        for bit in range(1 if dtype == torch.bool else 8):
            raw[place] ^= 1 << bit
            assert bit_hash(tensor) != before
            raw[place] ^= 1 << bit
    assert bit_hash(tensor) == before


def test_the_hash_knows_order_sign_of_zero_and_layout():
    assert bit_hash(torch.tensor([1.0, 2.0])) != bit_hash(torch.tensor([2.0, 1.0]))
    assert bit_hash(torch.tensor([0.0])) != bit_hash(torch.tensor([-0.0]))
    matrix = torch.randn(3, 4)
    assert bit_hash(matrix.T) == bit_hash(matrix.T.contiguous())
    assert bit_hash(torch.tensor(3.0)).shape == ()


def test_weights_and_moments_are_compared(toys):
    model = toys.Toy()
    optimizer = torch.optim.AdamW(model.text.parameters())
    for parameter in model.text.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    names = replicated_state(model, optimizer).keys()
    assert {"model.image.0.weight", "model.text.norm.weight", "optimizer.text.norm.weight.exp_avg_sq"} <= names


# The bit flips before update 7 (from 0 on). Step 6 was compared and equal, so was step 4 with its checkpoint.
@pytest.mark.parametrize(
    ("processes", "fault", "names", "verdict"),
    [
        (2, "flip-moment", "optimizer.text.norm.weight.exp_avg", "of ranks 0, 1 none is in the majority"),
        (3, "flip", "model.text.norm.weight", "rank 1 (1 of 3) not as the others"),
    ],
)
def test_a_flipped_bit_ends_the_run(finish, tmp_path, processes, fault, names, verdict):
    run, told = tmp_path / "run", tmp_path / "errors"
    arguments = {"program": FAULTY, "run_dir": str(run), "errors": str(told)}
    trainer = {"check_replicas_every": 3, "checkpoint_every": 4, "batch_size": 6}
    assert finish(processes, fault=fault, at=6, trainer=trainer, **arguments) == [1] * processes
    good = run / "checkpoints" / "step-00000004"
    for text in errors(told, processes):
        assert re.search(rf"ReplicaError: step 8: replicas differ in \S*{re.escape(names)}[, :]", text)
        assert f": {verdict}; stopped. Last good checkpoint: {good};" in text
    assert not (run / "checkpoints" / "step-00000008").exists()


def test_a_sound_run_passes(finish, tmp_path):
    trainer = {"check_replicas_every": 1}
    assert finish(2, program=FAULTY, run_dir=str(tmp_path / "run"), trainer=trainer) == [0, 0]
