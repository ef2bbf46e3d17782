"""Memory and traps of loading, whatever the layout."""

import subprocess
import sys
from pathlib import Path

import herdkit
import pytest
import torch
from herdkit.adapters import compose
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.interchange.tensor_files import (
    ModelDirectoryError,
    Piece,
    StoredTensors,
    fill,
    save_tensors,
)
from herdkit.train.portions import Portion
from safetensors.torch import save, save_file
from torch import nn

MiB = 2**20

# Runs alone: the growth of its resident memory, pages of mapped files included, while it loads.
MEASURE = r"""
import re, sys
from pathlib import Path
import herdkit

def status(key):
    return int(re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

for big, small in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    herdkit.load(small)  # what is imported and allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    model = herdkit.load(big)
    print(status("VmHWM") - before)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_loading_takes_the_model_and_one_file(make_model, tmp_path):
    config = TransformerConfig(dim=1024, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=1024, vocab_size=4096)
    models = {"big": compose(Transformer(config)), "small": compose(make_model(n_kv_heads=4))}
    layouts = {"huggingface": {"max_shard_bytes": 17 * MiB}, "meta": {"model_parallel": 4}}
    paths = [
        herdkit.save(model, tmp_path / f"{name}-{layout}", layout, **options)
        for layout, options in layouts.items()
        for name, model in models.items()
    ]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for path, grown in zip(paths[::2], run.stdout.split(), strict=True):
        sizes = [file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".pth")]
        assert len(sizes) >= 4
        assert sum(sizes) - 4 * MiB < int(grown) < sum(sizes) + max(sizes) + 6 * MiB < 1.5 * sum(sizes)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Trap()}, "not a whole PyTorch file of tensors alone"),
        ([torch.ones(2)], "holds something else than tensors by name"),
        ({"a": {"b": torch.ones(2)}}, "holds something else than tensors by name"),
        (b"cut", "not a whole PyTorch file of tensors alone"),
    ],
)
def test_nothing_but_tensors_is_unpickled(tmp_path, content, message):
    file = tmp_path / "x.pth"
    torch.save(content, file) if not isinstance(content, bytes) else file.write_bytes(content)
    with pytest.raises(ModelDirectoryError, match=f"x.pth: {message}"):
        fill(nn.Linear(2, 1), {file: [Piece("a", "weight")]})


def test_a_module_with_memory_keeps_its_dtype_and_one_on_meta_takes_the_widest(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(1, 2).bfloat16(), "bias": torch.ones(1)}, file)
    pieces = {file: [Piece(name, name) for name in ("weight", "bias")]}
    kept, new, asked = nn.Linear(2, 1).double(), nn.Linear(2, 1, device="meta"), nn.Linear(2, 1, device="meta")
    fill(kept, pieces)
    fill(new, pieces)
    fill(asked, pieces, dtype=torch.float16)
    assert (kept.weight.dtype, new.weight.dtype, asked.bias.dtype) == (torch.float64, torch.float32, torch.float16)
    assert all(torch.equal(weight, torch.ones_like(weight)) for m in (kept, new, asked) for weight in m.parameters())


def test_a_number_too_large_for_the_dtype_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.full((1, 2), 1e6), "bias": torch.ones(1)}, file)
    pieces = {file: [Piece(name, name) for name in ("weight", "bias")]}
    with pytest.raises(ModelDirectoryError, match=r"weight holds values that are not finite in torch\.float16"):
        fill(nn.Linear(2, 1, device="meta"), pieces, dtype=torch.float16)


def test_building_draws_no_random_numbers(make_model, tmp_path):
    path = herdkit.save(compose(make_model()), tmp_path / "model", "huggingface")
    state = torch.get_rng_state()
    herdkit.load(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(4).bfloat16(), "ä": torch.randn(2, 3).T, "empty": torch.ones(0, 2),
        "flags": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "count": torch.arange(3),
    }  # fmt: skip
    save_tensors(tensors, tmp_path / "x.safetensors")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x.safetensors").read_bytes() == save(contiguous, {"format": "pt"})


def test_any_region_is_read_from_blocks_of_rows_in_another_order(tmp_path):
    """A parameter in two files, the rows of each turned round within blocks of four."""
    whole = torch.randn(16, 6)
    pieces = {}
    for i, region in enumerate(((slice(0, 8),), (slice(8, 16),))):
        file = tmp_path / f"{i}.safetensors"
        save_file({"x": whole[region].unflatten(0, (-1, 4)).flip(1).flatten(0, 1)}, file)
        pieces[file] = [
            Piece("x", "w", region, arrange=lambda x: x.unflatten(0, (-1, 4)).flip(1).flatten(0, 1), block=4)
        ]
    stored = StoredTensors(pieces, {"w": whole})
    for rows in ((0, 16), (3, 6), (5, 11), (8, 8), (9, 10), (15, 16)):
        for columns in ((0, 6), (2, 3)):
            region = slice(*rows), slice(*columns)
            kept = torch.zeros(rows[1] - rows[0], columns[1] - columns[0])
            stored.read({"w": Portion(kept, region)})
            assert torch.equal(kept, whole[region])
