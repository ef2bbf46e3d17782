"""On every layout a composed model trains as in one process, whether or not a process has inputs."""

import runpy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from herdkit.adapters import compose
from herdkit.adapters.distribute import require_adapters_fit, share_out
from herdkit.text import preset as text_preset
from herdkit.text.parallel import stages
from herdkit.text.weights import HeldWeights
from herdkit.train.layout import Layout, LayoutError, ParallelConfig
from herdkit.train.place import Place
from herdkit.vision.image_adapter import placement
from herdkit.vision.image_adapter import preset as image_preset
from toy_adapters import TEXT, MemoryAdapter, SoftAdapter, ToyConfig, text_model

PROGRAM = Path(__file__).with_name("layouts.py")
TWO = {
    "replicas": {"recompute": "selective", "compile": "aot_eager"},
    "shards": {"shard": 2, "reshard": True},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "schedule": "interleaved", "chunks": 2},
}
FOUR = {
    "replicated-shards": {"shard": 2},
    "tensor-context": {"tensor": 2, "context": 2},
    "context-shards": {"context": 2, "shard": 2},
    "pipeline-tensor": {"pipeline": 2, "tensor": 2, "recompute": "full"},
    "pipeline-context": {"pipeline": 2, "context": 2},
    "pipeline-shards": {"pipeline": 2, "shard": 2},
    "tensor-shards": {"tensor": 2, "shard": 2, "reshard": True},
    "pipeline-replicas": {"pipeline": 2},
}
FROZEN = {"shards", "pipeline", "tensor", "tensor-shards", "pipeline-shards"}
"""Layouts that are trained with a frozen language model, too, as adapters are in the paper."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds with these options."""
    program = runpy.run_path(str(PROGRAM))

    @cache
    def find(**options):
        return program["run"](tmp_path_factory.mktemp("alone"), {}, **options)

    return find


@pytest.mark.parametrize(("processes", "layouts"), [(2, TWO), (4, FOUR)])
def test_trains_as_one_process_does(finish_program, tmp_path, alone, processes, layouts):
    runs = {name: {"layout": layout, "accumulate": 2} for name, layout in layouts.items()}
    runs |= {f"{name}-frozen": {**runs[name], "freeze": ("text.*",)} for name in FROZEN & layouts.keys()}
    arguments = {"runs": runs, "run_dir": str(tmp_path / "runs"), "out": str(tmp_path / "out")}
    assert finish_program(PROGRAM, processes, **arguments) == [0] * processes
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(processes)]
    for name, options in runs.items():
        wanted = alone(**{key: value for key, value in options.items() if key != "layout"})
        require_equal([one[name] for one in found], wanted, name)


def test_weights_gathered_in_bfloat16_have_gradients_in_float32(finish_program, tmp_path, alone):
    layouts = {"shards": {"shard": 4}, "pipeline-shards": {"pipeline": 2, "shard": 2}}
    options = {"dtype": "float32", "precision": "bfloat16", "freeze": ("text.*",)}
    runs = {name: {"layout": {**layout, "gather": "bfloat16"}, **options} for name, layout in layouts.items()}
    out = str(tmp_path / "out")
    assert finish_program(PROGRAM, 4, runs=runs, run_dir=str(tmp_path / "runs"), out=out) == [0] * 4
    wanted = alone(dtype="float32", freeze=("text.*",))["updates"][0]
    rounded = alone(**options)["updates"][0]
    for rank in range(4):
        for name, found in torch.load(f"{out}.{rank}", weights_only=True).items():
            for key, gradient in found["updates"][0].items():
                assert gradient.dtype == torch.float32
                error, usual = ((one - wanted[key]).norm() / wanted[key].norm() for one in (gradient, rounded[key]))
                assert 1e-4 < error < 4 * usual + 0.05, (name, key)


@pytest.mark.parametrize("key", ["recompute", "compile"])
def test_a_process_by_itself_runs_its_layers_as_the_layout_says(key):
    value = {"recompute": "full", "compile": "aot_eager"}[key]
    model = compose(text_model(), speech=SoftAdapter(ToyConfig(), TEXT))
    place = Place(ParallelConfig(**{key: value}))
    part = share_out(model, HeldWeights.of(model.text), place, 16)
    assert all(isinstance(layer.forward, partial) for layer in part.model.text.layers)


def test_a_run_goes_on_in_another_layout(finish_program, tmp_path, alone):
    """Each run stops after two updates on four processes and goes on as the next says on two."""
    first = {
        "pipeline": {"pipeline": 2, "tensor": 2},
        "shards": {"shard": 2, "context": 2},
        "copies": {"pipeline": 4},
    }
    then = {"pipeline": {"shard": 2}, "shards": {"pipeline": 2}, "copies": {"context": 2}}
    for processes, stop_after, layouts in ((4, 2, first), (2, None, then)):
        runs = {name: {"layout": layout, "accumulate": 2, "stop_after": stop_after} for name, layout in layouts.items()}
        out = str(tmp_path / "out")
        assert finish_program(PROGRAM, processes, runs=runs, run_dir=str(tmp_path / "runs"), out=out) == [0] * processes
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(2)]
    wanted = alone(accumulate=2)
    for name in then:
        for one in found:
            assert one[name]["tokens"] == wanted["tokens"]
            assert len(one[name]["updates"]) == 1
            require_close(one[name]["updates"][0], wanted["updates"][-1], 1e-9, name)
            require_close(one[name]["weights"], wanted["weights"], 1e-8, name)


def test_every_stage_of_the_largest_model_has_four_layers_and_one_of_cross_attention():
    """Section 7.3; the first and the last stage have embedding and output in place of a layer."""
    layers = text_preset("405b").n_layers
    places = placement(layers, image_preset("405b").n_cross_layers)
    found = stages(text_preset("405b"), ParallelConfig(pipeline=16, schedule="interleaved", chunks=2))
    assert [len(stage.layers) for stage in found] == [3, *[4] * 30, 3]
    assert [sum(i in stage.layers for i in places) for stage in found] == [1] * 32


def test_what_an_adapter_reads_is_not_divided():
    model = compose(text_model(), speech=SoftAdapter(ToyConfig(), TEXT))
    require_adapters_fit(model, Layout(tensor=2))
    model.speech.requires = ("text",)
    require_adapters_fit(model, Layout(context=2, shard=2))
    for dimension in ("tensor", "pipeline"):
        with pytest.raises(LayoutError, match=f"parallel.{dimension}: the adapter 'speech' reads weights"):
            require_adapters_fit(model, Layout(**{dimension: 2}))
    model.speech.requires = ("embeddings",)
    require_adapters_fit(model, Layout(tensor=2, pipeline=2))
    model.attach(MemoryAdapter(ToyConfig(), TEXT))
    model.image.requires = ("embeddings",)
    require_adapters_fit(model, Layout(tensor=2))
    with pytest.raises(LayoutError, match=r"parallel.pipeline: the adapter 'image' reads embeddings"):
        require_adapters_fit(model, Layout(pipeline=2))


def test_an_objective_of_other_batches_shares_the_storage_of_weights_alone():
    model = compose(text_model(), speech=SoftAdapter(ToyConfig(), TEXT))
    place = Place()
    assert share_out(model, HeldWeights.of(model.text), place, 16, objective=len).objective is len
    place.layout = Layout(context=2)
    with pytest.raises(LayoutError, match=r"parallel.context: this objective shares the storage of weights alone"):
        share_out(model, HeldWeights.of(model.text), place, 16, objective=len)


def require_equal(found, wanted, name):
    for one in found:
        for key in ("tokens", "parameters", "trained_parameters"):
            assert one[key] == wanted[key], (name, key)
        for key in ("loss", "accuracy", "grad_norm"):
            assert one["last"][key] == pytest.approx(wanted["last"][key], rel=1e-9), (name, key)
        for key in ("loss", "size_loss"):
            assert one["mean"][key] == pytest.approx(wanted["mean"][key], rel=1e-9), (name, key)
        require_close(one["weights"], wanted["weights"], 1e-8, name)
    assert {key for one in found for key in one["weights"]} == wanted["weights"].keys(), name
    for i, gradients in enumerate(wanted["updates"]):
        assert {key for one in found for key in one["updates"][i]} == gradients.keys(), (name, i)
        for one in found:
            require_close(one["updates"][i], gradients, 1e-9, f"{name}, update {i}")


def require_close(found, wanted, tolerance, where):
    for name, value in found.items():
        limit = tolerance * wanted[name].abs().max().item()
        difference = (value - wanted[name]).abs().max().item()
        assert difference <= limit, f"{where}: {name}: {difference:.2g} of {limit:.2g}"
