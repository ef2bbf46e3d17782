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
    "pipeline-fsdp": {"pipeline": 2, "shard": 2, "recompute": "full"},
    "pipeline-tensor": {"pipeline": 2, "tensor": 2},
    "pipeline-context": {"pipeline": 2, "context": 2},
    "pipeline-replicas": {"pipeline": 2},
    "interleaved-fsdp": {"pipeline": 2, "shard": 2, "schedule": "interleaved", "chunks": 2},
}
EIGHT = {
    "pipeline-tensor-fsdp": {"pipeline": 2, "tensor": 2, "shard": 2},
    "pipeline-context-tensor": {"pipeline": 2, "context": 2, "tensor": 2},
    "tensor-context-fsdp": {"tensor": 2, "context": 2, "shard": 2, "reshard": True},
    "context-hsdp": {"context": 2, "shard": 2},
}
TIED = ("fsdp", "context", "tensor-fsdp", "pipeline-fsdp", "pipeline-tensor", "interleaved")
FLOAT32 = ("replicas", "hsdp", "tensor-context", "pipeline-fsdp")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds with these options."""
    layouts = runpy.run_path(str(PROGRAM))

    @cache
    def find(**options):
        return layouts["run"](tmp_path_factory.mktemp("alone"), {}, **options)

    return find


def require_equal(found, wanted, tolerance):
    for one in found:
        assert one["tokens"] == wanted["tokens"]
        for key in ("loss", "accuracy", "grad_norm"):
            assert one["last"][key] == pytest.approx(wanted["last"][key], rel=tolerance), key
    for i, gradients in enumerate(wanted["updates"]):
        require_close([one["updates"][i] for one in found], gradients, tolerance)
    # AdamW's first steps depend on the signs of gradients, however small.
    require_close([one["weights"] for one in found], wanted["weights"], 100 * tolerance)


def require_close(found, wanted, tolerance):
    """Of what the processes have, each has what it has right, and together they have everything."""
    covered = {name: {} for name in wanted}
    for one in found:
        for name, (part, region) in one.items():
            whole, _ = wanted[name]
            limit = tolerance * whole.abs().max().item()
            expected = whole[tuple(slice(*ends) for ends in region)]
            assert part.shape == expected.shape
            difference = (part - expected).abs().max().item() if part.numel() else 0.0
            assert difference <= limit, f"{name}: {difference:.2g} of {limit:.2g}"
            covered[name][str(region)] = part.numel()
    assert {name: sum(parts.values()) for name, parts in covered.items()} == {
        name: whole.numel() for name, (whole, _) in wanted.items()
    }


def test_a_run_goes_on_in_another_layout(finish_program, alone, tmp_path):
    """Each run is interrupted after two updates and goes on as the next says, first on four processes, then on two."""
    first = {
        "pipeline": {"pipeline": 2, "tensor": 2},
        "fsdp": {"shard": 2, "tensor": 2},
        "context": {"context": 2, "shard": 2},
    }
    then = {"pipeline": {"shard": 2}, "fsdp": {"pipeline": 2}, "context": {"tensor": 2}}
    options = {"accumulate": 2, "checkpoint_every": 1, "freeze": ["layers.1.*"]}
    starts = [
        {f"{name}{background}": {"layout": layout, "background_checkpoints": bool(background), **options}
         for name, layout in layouts.items() for background in ("", "-background")}
        for layouts in (first, then)
    ]  # fmt: skip
    for processes, stop_after, runs in zip((4, 2), (2, None), starts, strict=True):
        runs = {name: {**run, "stop_after": stop_after} for name, run in runs.items()}
        out = str(tmp_path / "out")
        assert finish_program(PROGRAM, processes, runs=runs, run_dir=str(tmp_path / "runs"), out=out) == [0] * processes
    wanted = alone(freeze=("layers.1.*",))
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(2)]
    for name in starts[1]:
        print(name)
        assert found[0][name]["tokens"] == wanted["tokens"]
        assert len(found[0][name]["updates"]) == 1
        require_close([one[name]["updates"][0] for one in found], wanted["updates"][-1], 1e-10)
        require_close([one[name]["weights"] for one in found], wanted["weights"], 1e-8)


def test_the_same_layout_resumes_bitwise(finish_program, tmp_path):
    layouts = {"fsdp": {"shard": 2}, "pipeline": {"pipeline": 2}, "tensor": {"tensor": 2}, "context": {"context": 2}}
    runs = {}
    for name, layout in layouts.items():
        options = {"layout": layout, "dtype": "float32", "accumulate": 2, "checkpoint_every": 1}
        runs[f"{name}-straight"] = options
        runs[f"{name}/1"] = {**options, "stop_after": 1}
        runs[f"{name}/2"] = options
    assert finish_program(PROGRAM, 2, runs=runs, run_dir=str(tmp_path / "runs"), out=str(tmp_path / "out")) == [0, 0]
    for rank in range(2):
        found = torch.load(f"{tmp_path}/out.{rank}", weights_only=True)
        for name in layouts:
            straight, resumed = found[f"{name}-straight"]["weights"], found[f"{name}/2"]["weights"]
            assert straight.keys() == resumed.keys()
            assert all(torch.equal(straight[key][0], resumed[key][0]) for key in straight), name


@pytest.mark.parametrize(("processes", "layouts"), [(2, TWO), (4, FOUR), (8, EIGHT)])
def test_layouts_give_the_gradients_and_updates_of_one_process(finish_program, alone, tmp_path, processes, layouts):
    runs = {name: {"layout": layout, "accumulate": 2, "steps": 2} for name, layout in layouts.items()}
    runs |= {f"{name}-tied": {**runs[name], "tied": True} for name in TIED if name in layouts}
    # Later updates in float32 also carry what rounding did to the weights before.
    runs |= {f"{name}-float32": {**runs[name], "dtype": "float32", "steps": 1} for name in FLOAT32 if name in layouts}
    codes = finish_program(PROGRAM, processes, runs=runs, run_dir=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    assert codes == [0] * processes
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(processes)]
    for name, options in runs.items():
        print(name)
        wanted = alone(**{key: options[key] for key in ("dtype", "tied", "steps") if key in options})
        require_equal([one[name] for one in found], wanted, 1e-5 if name.endswith("-float32") else 1e-10)
