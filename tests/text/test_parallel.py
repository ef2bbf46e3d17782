from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from herdkit.text import Transformer, preset
from herdkit.text.parallel import layer_weights, require_fits, shares, stages
from herdkit.train.layout import DIMENSIONS, Layout, LayoutError, ParallelConfig, lay_out
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def fake_processes():
    def start(count):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield start
    dist.destroy_process_group()


def stored_by_torch(config, layout, share):
    """Elements that the first process stores of these stages, sharded by torch itself."""
    with torch.device("meta"):
        model = Transformer(replace(config, n_layers=share.layers))
    plan = {"tok_embeddings": RowwiseParallel(), "output": ColwiseParallel(), "norm": SequenceParallel()}
    for name, weight in layer_weights(config).items():
        style = {0: ColwiseParallel, 1: RowwiseParallel, None: SequenceParallel}[weight.divided]()
        plan[f"layers.*.{name}"] = style
    if not share.embedding:
        model.tok_embeddings = None
    if not share.output:
        model.norm = model.output = None
    plan = {name: style for name, style in plan.items() if getattr(model, name, True) is not None}
    mesh = init_device_mesh("cpu", layout.degrees[::-1], mesh_dim_names=DIMENSIONS[::-1])
    parallelize_module(model, mesh["tensor"], plan)
    storage = mesh["shard", "context"]._flatten("storage")
    for layer in model.layers:
        fully_shard(layer, mesh=storage)
    fully_shard(model, mesh=storage)
    return sum(weight.to_local().numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "degrees", "processes"),
    [
        ("405b", {"tensor": 8, "pipeline": 16, "schedule": "interleaved", "chunks": 8, "shard": None}, 16_384),
        # Storage over 2,048 processes: more than a matrix of keys has rows, so that many have nothing of it.
        ("8b", {"tensor": 2, "context": 4, "shard": 512}, 4096),
    ],
)
def test_a_process_stores_what_torch_gives_it(name, degrees, processes, fake_processes):
    fake_processes(processes)
    config, parallel = preset(name), ParallelConfig(**degrees)
    if parallel.pipeline == 1:
        config = replace(config, n_layers=2)
    layout = lay_out(parallel, processes)
    for share in shares(config, parallel, layout).values():
        assert share.stored == stored_by_torch(config, layout, share)


def test_the_papers_pipeline_comes_out_even():
    parallel = ParallelConfig(pipeline=16, schedule="interleaved", chunks=8)
    config = preset("405b")
    made = stages(config, parallel)
    assert [len(stage.layers) for stage in made] == [0, *[1] * 126, 0]
    assert (made[0].embedding, made[0].output, made[-1].embedding, made[-1].output) == (True, False, False, True)
    found = shares(config, parallel, Layout(tensor=8, pipeline=16, shard=128))
    assert {place: [len(stage.layers) for stage in share.stages] for place, share in found.items()} == {
        0: [0, *[1] * 7],
        1: [1] * 8,
        15: [*[1] * 7, 0],
    }


@pytest.mark.parametrize(("name", "pipeline"), [("8b", 4), ("70b", 7), ("8b", 2), ("8b", 34)])
def test_every_layer_has_a_stage(name, pipeline):
    config = preset(name)
    made = stages(config, ParallelConfig(pipeline=pipeline))
    assert [layer for stage in made for layer in stage.layers] == list(range(config.n_layers))
    sizes = [len(stage.layers) + stage.embedding + stage.output for stage in made]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("layout", "row_length", "problem"),
    [
        (Layout(tensor=16), 8192, "parallel.tensor: 16 does not divide n_kv_heads 8"),
        (Layout(tensor=3), 8192, "parallel.tensor: 3 does not divide n_heads 32"),
        (Layout(context=3), 8192, "parallel.context: row_length 8192 is not a multiple of 2 x context = 6"),
        (Layout(tensor=8), 1001, "row_length 1001 is not a multiple of tensor x context = 8 x 1"),
    ],
)
def test_what_does_not_divide_the_model_is_refused(layout, row_length, problem):
    with pytest.raises(LayoutError, match=problem):
        require_fits(preset("8b"), layout, row_length)


def test_stages_that_cannot_be_are_refused():
    with pytest.raises(LayoutError, match=r"4 x 16 = 64 stages are more than n_layers \+ 2 = 32 \+ 2 = 34"):
        stages(preset("8b"), ParallelConfig(pipeline=4, schedule="interleaved", chunks=16))
