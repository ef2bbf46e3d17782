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
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds with these options."""
    layouts = runpy.run_path(str(PROGRAM))

    @cache
    def find(**options):
        return layouts["run"](tmp_path_factory.mktemp("alone"), {}, **options)

    return find


def require_equal(found, wanted, tolerance, updates):
    assert found["tokens"] == wanted["tokens"]
    for key in ("loss", "accuracy", "grad_norm"):
        assert found["last"][key] == pytest.approx(wanted["last"][key], rel=tolerance), key
    for one, other in zip(found["updates"][:updates], wanted["updates"][:updates], strict=True):
        require_close(one, other, tolerance)
    # AdamW's first steps depend on the signs of gradients, however small.
    require_close(found["weights"], wanted["weights"], 100 * tolerance)


def require_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        limit = tolerance * value.abs().max().item()
        difference = (found[name] - value).abs().max().item()
        assert difference <= limit, f"{name}: {difference:.2g} of {limit:.2g}"


@pytest.mark.parametrize(("processes", "layouts"), [(2, TWO), (4, FOUR)])
def test_layouts_give_the_gradients_and_updates_of_one_process(finish_program, alone, tmp_path, processes, layouts):
    kinds = {"": {}, "-tied": {"tied": True}, "-float32": {"dtype": "float32"}}
    runs = {
        f"{name}{kind}": {"layout": layout, **options}
        for name, layout in layouts.items()
        for kind, options in kinds.items()
    }
    codes = finish_program(PROGRAM, processes, runs=runs, run_dir=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    assert codes == [0] * processes
    for rank in range(processes):
        found = torch.load(f"{tmp_path}/out.{rank}", weights_only=True)
        for name, options in runs.items():
            wanted = alone(**{key: value for key, value in options.items() if key != "layout"})
            print(name, rank)
            if name.endswith("-float32"):  # later updates also carry what rounding did to the weights before
                require_equal(found[name], wanted, 1e-5, updates=1)
            else:
                require_equal(found[name], wanted, 1e-10, updates=3)
