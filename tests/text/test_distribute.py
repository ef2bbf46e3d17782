"""Every layout trains as one process does."""

import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("layouts.py")
TWO = {
    "fsdp": {"shard": 2},
    "fsdp-reshard": {"shard": 2, "reshard": True},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "replicas": {},
    "pipeline": {"pipeline": 2},
    "gpipe": {"pipeline": 2, "schedule": "gpipe"},
    "interleaved": {"pipeline": 2, "schedule": "interleaved", "chunks": 2, "consecutive": 2},
}
FOUR = {
    "fsdp": {"shard": None, "reshard": True},
    "hsdp": {"shard": 2},
    "tensor": {"tensor": 4},
    "tensor-replicas": {"tensor": 2},
    "tensor-fsdp": {"tensor": 2, "shard": 2, "reshard": True},
    "context": {"context": 4},
    "context-fsdp": {"context": 2, "shard": 2},
    "context-replicas": {"context": 2},
    "tensor-context": {"tensor": 2, "context": 2, "recompute": "selective"},
    "pipeline": {"pipeline": 4},
    "pipeline-fsdp": {"pipeline": 2, "shard": 2},
    "pipeline-tensor": {"pipeline": 2, "tensor": 2},
    "pipeline-context": {"pipeline": 2, "context": 2},
    "pipeline-replicas": {"pipeline": 2},
    "interleaved-fsdp": {"pipeline": 2, "shard": 2, "schedule": "interleaved", "chunks": 2},
}
TIED = ("fsdp", "context", "tensor-fsdp")
FLOAT32 = ("replicas", "hsdp", "tensor-context", "pipeline-fsdp")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds with these options."""
    layouts = runpy.run_path(str(PROGRAM))

    @cache
    def find(**options):
        return layouts["run"](tmp_path_factory.mktemp("alone"), {}, **options)

    return find


def require_equal(found, wanted, tolerance, updates):
    for one in found:
        assert one["tokens"] == wanted["tokens"]
        for key in ("loss", "accuracy", "grad_norm"):
            assert one["last"][key] == pytest.approx(wanted["last"][key], rel=tolerance), key
    for i in range(updates):
        require_close([one["updates"][i] for one in found], wanted["updates"][i], tolerance)
    # AdamW's first steps depend on the signs of gradients, however small.
    require_close([one["weights"] for one in found], wanted["weights"], 100 * tolerance)


def require_close(found, wanted, tolerance):
    """Of what the processes have, each has what it has right, and together they have everything."""
    assert {name for one in found for name in one} == wanted.keys()
    for one in found:
        for name, value in one.items():
            limit = tolerance * wanted[name].abs().max().item()
            difference = (value - wanted[name]).abs().max().item()
            assert difference <= limit, f"{name}: {difference:.2g} of {limit:.2g}"


@pytest.mark.parametrize(("processes", "layouts"), [(2, TWO), (4, FOUR)])
def test_layouts_give_the_gradients_and_updates_of_one_process(finish_program, alone, tmp_path, processes, layouts):
    runs = {name: {"layout": layout, "accumulate": 2} for name, layout in layouts.items()}
    runs |= {f"{name}-tied": {"layout": layouts[name], "tied": True} for name in TIED if name in layouts}
    runs |= {f"{name}-float32": {"layout": layouts[name], "dtype": "float32"} for name in FLOAT32 if name in layouts}
    codes = finish_program(PROGRAM, processes, runs=runs, run_dir=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    assert codes == [0] * processes
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(processes)]
    for name, options in runs.items():
        print(name)
        wanted = alone(**{key: options[key] for key in ("dtype", "tied") if key in options})
        tolerance, updates = (1e-5, 1) if name.endswith("-float32") else (1e-10, 3)
        # Later updates in float32 also carry what rounding did to the weights before.
        require_equal([one[name] for one in found], wanted, tolerance, updates)
