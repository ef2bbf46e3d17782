"""Makes, trains and writes a language model that processes share; a program for `finish_program`."""

import ctypes
import os
import re
import runpy
from pathlib import Path

import torch
from herdkit.text import TransformerConfig
from herdkit.text.distribute import DistributedModel, distribute, of_own_positions, share_out
from herdkit.text.model_directory import open_text, save_text
from herdkit.text.objective import next_token
from herdkit.text.weights import DrawnWeights
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig, parallel, train
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place

LAYOUTS = runpy.run_path(str(Path(__file__).with_name("layouts.py")))
SIZES = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 48, "vocab_size": 1024, "max_seq_len": 16}
BIG = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 2048, "vocab_size": 4096}
FILES = {
    "herdkit": {},
    "huggingface": {"max_shard_bytes": 40_000},
    "meta": {"model_parallel": 2},
}


def write(part, tokenizer, to):
    for layout, options in FILES.items():
        save_text(part.weights(), tokenizer, to / layout, layout, **options)


def draw(tokenizer, to, layout, tied=False):
    """Draws a model and writes it in every layout of files."""
    config = TransformerConfig(**SIZES, tie_embeddings=tied)
    write(share_out(DrawnWeights(config, seed=3), Place(ParallelConfig(**layout)), [16]), tokenizer, to)


def read(start, to, layout):
    """Reads a model in every layout of files and writes it as Hugging Face has it, in a single file."""
    for name in FILES:
        weights, _ = open_text(start / name)
        part = share_out(weights, Place(ParallelConfig(**layout)), [16])
        save_text(part.weights(), None, to / name, "huggingface")


def train_briefly(start, layout, whole):
    """Two updates, by a part of a whole model or by one that never was whole; this process's weights."""
    weights, _ = open_text(start)
    place = Place(ParallelConfig(**layout))
    if whole:
        model = weights.load()
        part = DistributedModel(model, place, distribute(model, place))
    else:
        part = share_out(weights, place, [16])
    train(
        part.model,
        LAYOUTS["Rows"](place.data, place.layout.data, 2, None),
        of_own_positions(next_token, place),
        trainer=TrainerConfig(steps=2, batch_size=8, accumulate=2),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(),
        run_dir=parallel.on_first(lambda: str(start / f"run-{len(list(start.glob('run-*')))}")),
        place=place,
        pipeline=part.pipeline,
    )
    return {name: parallel.local(p.detach()).clone() for name, p in part.model.named_parameters()}


def status(key):
    return int(re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def grown(found, what, function):
    """What a function makes; into `found`, the bytes by which resident memory grew at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    made = function()
    found[what] = status("VmHWM") - before
    parallel.barrier()
    return made


def measure(tokenizer, start, to, layout):
    """Bytes by which resident memory grew at most while a model was drawn, read, and written."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back
    place, found = Place(ParallelConfig(**layout)), {}
    small = share_out(DrawnWeights(TransformerConfig(**SIZES), 0), place, ())
    save_text(small.weights(), tokenizer, to / "small")  # what is imported and allocated once
    config = TransformerConfig(**BIG)

    part = grown(found, "drawn", lambda: share_out(DrawnWeights(config, 0), place, ()))
    grown(
        found, "written", lambda: save_text(part.weights(), tokenizer, start, "huggingface", max_shard_bytes=50 << 20)
    )
    del part
    part = grown(found, "read", lambda: share_out(open_text(start)[0], place, ()))
    grown(found, "in one file", lambda: save_text(part.weights(), tokenizer, to / "big"))
    found["kept"] = sum(parallel.local(p).nbytes for p in part.model.parameters())
    return found


def main(calls, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        found = [globals()[name](**options) for name, options in calls]
        torch.save(found, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
