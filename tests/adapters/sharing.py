"""Reads and writes a composed model that processes share; a program for `finish_program`."""

import ctypes
import os
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from herdkit.adapters.distribute import distributed_composition
from herdkit.adapters.model_directory import open_model, save
from herdkit.text import TransformerConfig
from herdkit.text.distribute import share_out
from herdkit.text.model_directory import save_text
from herdkit.text.weights import DrawnWeights
from herdkit.train import parallel
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from toy_adapters import MemoryAdapter, ToyConfig

TEXT = runpy.run_path(str(Path(__file__).parents[1] / "text" / "sharing.py"))


def draw(tokenizer, to, sizes):
    config = TransformerConfig(**TEXT[sizes])
    save_text(share_out(DrawnWeights(config, seed=3), Place(), ()).weights(), tokenizer, to)


def measure(small, start, to, layout):
    """Bytes by which resident memory grew at most while a model was read and written."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back
    place = Place(ParallelConfig(**layout))
    pass_through(small, to / "small", place)  # what is imported and allocated once
    return pass_through(start, to / "big", place)


def pass_through(start, to, place):
    found, grown = {}, TEXT["grown"]
    with ExitStack() as left:

        def read():
            model, weights = open_model(start)
            torch.manual_seed(0)
            model.attach(MemoryAdapter(ToyConfig(), model.text.config))
            return model, left.enter_context(distributed_composition(model, weights, place, 16))

        model, part = grown(found, "read", read)
        grown(found, "written", lambda: save(model, to, shared=part.tensors()))
        return found | {"kept": sum(parallel.local(p).nbytes for p in part.model.text.parameters())}


def main(calls, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        torch.save([globals()[name](**options) for name, options in calls], f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
