"""Models that are never whole in any process."""

import runpy
from pathlib import Path

import pytest
import torch
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.interchange import ModelDirectoryError
from herdkit.text.model_directory import load_text, open_text
from herdkit.text.weights import DrawnWeights
from herdkit.train.portions import portions
from safetensors.torch import load_file, save_file

PROGRAM = Path(__file__).with_name("sharing.py")
FOUR = {
    "hsdp": {"shard": 2},
    "tensor": {"tensor": 4},
    "tensor-fsdp": {"tensor": 2, "shard": 2},
    "interleaved-fsdp": {"pipeline": 2, "shard": 2, "schedule": "interleaved", "chunks": 2},
}
MiB = 2**20


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer):
    """What one process writes: a model, and the same with tied embeddings."""
    program, root = runpy.run_path(str(PROGRAM)), tmp_path_factory.mktemp("alone")
    for name, tied in (("own", False), ("tied", True)):
        program["draw"](tokenizer, root / name, {}, tied)
    return root


def test_every_layout_draws_reads_and_writes_what_one_process_does(finish_program, alone, tokenizer, tmp_path):
    read = ("tensor-fsdp", "interleaved-fsdp")
    calls = [("draw", {"to": tmp_path / name, "layout": layout}) for name, layout in FOUR.items()]
    calls += [("draw", {"to": tmp_path / "tied", "layout": FOUR["interleaved-fsdp"], "tied": True})]
    for _, options in calls:
        options["tokenizer"] = tokenizer
    calls += [
        ("read", {"start": alone / "own", "to": tmp_path / f"{name}-read", "layout": FOUR[name]}) for name in read
    ]
    assert finish_program(PROGRAM, 4, calls=calls, out=str(tmp_path / "out")) == [0] * 4
    wanted = files_of(alone / "own")
    assert sum("safetensors" in name for name in wanted) > 5
    for name in FOUR:
        assert files_of(tmp_path / name) == wanted, name
    assert files_of(tmp_path / "tied") == files_of(alone / "tied")
    drawn = load_text(alone / "own" / "herdkit")[0].state_dict()
    for name in read:
        found = [files_of(tmp_path / f"{name}-read" / layout) for layout in ("herdkit", "huggingface", "meta")]
        assert found[0] == found[1] == found[2]
        stored = load_file(tmp_path / f"{name}-read" / "herdkit" / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], drawn["output.weight"])


def test_a_model_that_never_was_whole_trains_to_the_same_bits(finish_program, alone, tmp_path):
    layouts = [FOUR[name] for name in ("tensor-fsdp", "interleaved-fsdp")]
    calls = [
        ("train_briefly", {"start": alone / "own" / "herdkit", "layout": layout, "whole": whole})
        for layout in layouts
        for whole in (True, False)
    ]
    assert finish_program(PROGRAM, 4, calls=calls, out=str(tmp_path / "out")) == [0] * 4
    start = load_text(alone / "own" / "herdkit")[0].state_dict()
    for rank in range(4):
        found = torch.load(f"{tmp_path}/out.{rank}", weights_only=True)
        for whole, part in zip(found[::2], found[1::2], strict=True):
            assert whole.keys() == part.keys()
            assert all(torch.equal(whole[name], part[name]) for name in whole)
            assert any(whole[name].shape != start[name].shape for name in whole)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_no_process_has_more_than_its_part_and_a_tensor(finish_program, tokenizer, tmp_path):
    layouts = {"fsdp": {"shard": 4}, "pipeline-fsdp": {"pipeline": 2, "shard": 2}}
    calls = [
        (
            "measure",
            {"tokenizer": tokenizer, "start": tmp_path / f"{name}-start", "to": tmp_path / name, "layout": layout},
        )
        for name, layout in layouts.items()
    ]
    assert finish_program(PROGRAM, 4, calls=calls, out=str(tmp_path / "out")) == [0] * 4
    largest, whole = 8 * MiB, 144 * MiB
    for rank in range(4):
        for found in torch.load(f"{tmp_path}/out.{rank}", weights_only=True):
            print({key: value / MiB for key, value in found.items()})
            kept = found.pop("kept")
            assert 0.9 * whole / 4 < kept < 1.1 * whole / 4
            for what in ("drawn", "read"):
                assert found[what] < kept + largest + 4 * MiB
            for what in ("written", "in one file"):
                assert found[what] < 2 * largest + 6 * MiB


def test_a_parameter_is_drawn_by_its_name_alone():
    config = TransformerConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=512)
    model, again, other = (Transformer(config) for _ in range(3))
    DrawnWeights(config, 7).read(portions(model.state_dict()))
    DrawnWeights(config, 8).read(portions(other.state_dict()))
    DrawnWeights(config, 7).read(portions({name: t for name, t in again.state_dict().items() if "layers.1" in name}))
    state, same, differing = model.state_dict(), again.state_dict(), other.state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor))
            continue
        assert torch.equal(tensor, same[name]) == ("layers.1" in name)
        assert not torch.equal(tensor, differing[name])
        std = (
            1.0 if "tok" in name else tensor.shape[1] ** -0.5 / (2 if name.endswith(("wo.weight", "w2.weight")) else 1)
        )
        assert tensor.std().item() == pytest.approx(0.986 * std, rel=0.05)  # cut at three deviations
    q = [state[f"layers.{i}.attention.wq.weight"].flatten() for i in range(2)]
    assert torch.corrcoef(torch.stack(q))[0, 1].abs() < 0.05


def test_files_that_do_not_fit_are_named_when_they_are_read(alone, tmp_path):
    (tmp_path / "config.json").write_text((alone / "own" / "herdkit" / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((alone / "own" / "herdkit" / "tokenizer.json").read_text())
    tensors = load_file(alone / "own" / "herdkit" / "text.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][:-1]
    tensors["layers.2.ffn_norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "text.safetensors")
    weights, _ = open_text(tmp_path)
    model = weights.outline().to_empty(device="cpu")
    with pytest.raises(ModelDirectoryError, match=r"norm\.weight has shape \(31,\).*layers\.2\.ffn_norm.*not finite"):
        weights.read(portions(model.state_dict()))
