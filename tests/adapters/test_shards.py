"""Adapters on a language model that is stored in shards, with processes that have no input for them."""

import runpy
from pathlib import Path

import pytest
import torch
from herdkit.train.layout import LayoutError, ParallelConfig
from herdkit.train.place import Place

PROGRAM = Path(__file__).with_name("shards.py")
LAYOUTS = {
    2: {"replicas": {}, "shards": {"shard": 2}, "dropped": {"shard": 2, "reshard": True}},
    4: {"shards": {"shard": None}, "replicated-shards": {"shard": 2}},
}


@pytest.mark.parametrize("processes", [2, 4])
def test_trains_as_one_process_does(finish_program, tmp_path, processes):
    wanted = runpy.run_path(str(PROGRAM))["run"](tmp_path / "alone", {})
    arguments = {"runs": LAYOUTS[processes], "run_dir": str(tmp_path / "runs"), "out": str(tmp_path / "out")}
    assert finish_program(PROGRAM, processes, **arguments) == [0] * processes
    for rank in range(processes):
        found = torch.load(f"{tmp_path}/out.{rank}", weights_only=True)
        for name in LAYOUTS[processes]:
            assert found[name]["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
            assert found[name]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-8)
            for key, value in wanted["weights"].items():
                torch.testing.assert_close(
                    found[name]["weights"][key], value, rtol=1e-6, atol=1e-9, msg=f"{name} {key}"
                )


def test_shares_nothing_else(monkeypatch):
    place = object.__new__(Place)
    place.layout = type("Layout", (), {"tensor": 1, "context": 1, "pipeline": 2})
    with pytest.raises(LayoutError, match=r"parallel.pipeline: stage 'x' shares the storage of weights alone"):
        place.require_storage_alone("stage 'x'")
    assert Place(ParallelConfig()).replicas_alone
