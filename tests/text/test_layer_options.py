"""Compiled layers, weights gathered in bfloat16, products in float8: on processes that share the model."""

import runpy
from pathlib import Path

import pytest
import torch
from herdkit.train.checkpoint import describe_tensors, list_checkpoints
from herdkit.train.layout import LayoutError, ParallelConfig, lay_out

PROGRAM = Path(__file__).with_name("layouts.py")
COMPILED = {
    "fsdp": {"shard": 2, "reshard": True, "recompute": "full"},
    "tensor": {"tensor": 2, "recompute": "selective"},
}
GATHERED = {
    "fsdp": {"shard": 4, "reshard": True, "recompute": "selective"},
    "tensor-fsdp": {"tensor": 2, "shard": 2},
    "pipeline-fsdp": {"pipeline": 2, "shard": 2},
}


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory):
    layouts = runpy.run_path(str(PROGRAM))
    return lambda **options: layouts["run"](tmp_path_factory.mktemp("alone"), **options)


def on_processes(finish_program, processes, runs, tmp_path):
    codes = finish_program(PROGRAM, processes, runs=runs, run_dir=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    assert codes == [0] * processes
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(processes)]
    return {name: [one[name] for one in found] for name in runs}


def furthest(found, wanted):
    """The largest difference of all gradients of the first update, relative to the norm of each."""
    differences = {}
    for one in found:
        for name, (part, region) in one["updates"][0].items():
            whole, _ = wanted["updates"][0][name]
            difference = part - whole[tuple(slice(*ends) for ends in region)]
            differences[name] = max(differences.get(name, 0), (difference.norm() / whole.norm()).item())
    assert differences.keys() == wanted["updates"][0].keys()
    return max(differences.values())


def test_compiled_layers_give_the_gradients_of_eager_ones(finish_program, run_alone, tmp_path):
    # Rows of one document: the attention of others is not compiled on a CPU.
    options = {"accumulate": 2, "steps": 1, "packed": False}
    runs = {name: {"layout": {**layout, "compile": "aot_eager"}, **options} for name, layout in COMPILED.items()}
    found = on_processes(finish_program, 2, runs, tmp_path)
    wanted = run_alone(layout={}, **options)
    for name in COMPILED:
        assert furthest(found[name], wanted) < 1e-10, name
    for fsdp, tensor in zip(found["fsdp"], found["tensor"], strict=True):
        assert 0 < fsdp["graphs"] < tensor["graphs"]


def test_weights_gathered_in_bfloat16_are_kept_and_summed_in_float32(finish_program, run_alone, tmp_path):
    options = {"dtype": "float32", "accumulate": 2, "steps": 2, "precision": "bfloat16"}
    runs = {name: {"layout": {**layout, "gather": "bfloat16"}, **options} for name, layout in GATHERED.items()}
    runs["wide"] = {"layout": GATHERED["fsdp"], **options}
    found = on_processes(finish_program, 4, runs, tmp_path)
    wanted = run_alone(layout={}, dtype="float32", accumulate=2)
    for name in GATHERED:
        assert 1e-4 < furthest(found[name], wanted) < 0.1, name
        for one in found[name]:
            values = [value for tensors in (one["weights"], *one["updates"]) for value, _ in tensors.values()]
            assert {value.dtype for value in values} == {torch.float32}
        kinds = describe_tensors(list_checkpoints(tmp_path / "runs" / name)[0])
        assert {dtype for _, dtype in kinds.values()} == {torch.float32}
    assert furthest(found["fsdp"], wanted) != furthest(found["wide"], wanted)


def test_products_in_float8_on_processes(finish_program, run_alone, tmp_path):
    options = {"dtype": "float32", "accumulate": 2, "steps": 1}
    layouts = {"fsdp": {"shard": 2}, "tensor": {"tensor": 2}}
    runs = {name: {"layout": {**layout, "float8": "emulated"}, **options} for name, layout in layouts.items()}
    found = on_processes(finish_program, 2, runs, tmp_path)
    eager = run_alone(layout={}, **options)
    wanted = run_alone(layout={"float8": "emulated"}, **options)
    assert 0.02 < furthest([wanted], eager) < 0.5
    for name in layouts:
        # Scales are of what a process has of a batch, so that the last bits differ.
        assert 0.02 < furthest(found[name], eager) < 0.5, name


def test_what_cannot_be_is_refused(run_alone):
    with pytest.raises(LayoutError, match=r"gather: .bfloat16., but nothing is stored in shards.* to float32"):
        lay_out(ParallelConfig(gather="bfloat16", tensor=2), 4)
    # Of as many shards as there are processes there may be one.
    assert lay_out(ParallelConfig(gather="bfloat16", shard=None), 1).storage == 1
    with pytest.raises(LayoutError, match=r"parallel\.float8: cpu does not multiply float8"):
        run_alone(layout={"float8": "tensorwise"})
