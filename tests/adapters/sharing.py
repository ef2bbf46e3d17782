"""Reads and writes a composed model that processes share; a program for `finish_program`."""

import ctypes
import gc
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from herdkit.adapters import GatedCrossAttention, compose, register_adapter
from herdkit.adapters.deferred import interleaved_layers, without_memory
from herdkit.adapters.distribute import share_out
from herdkit.adapters.model_directory import open_model, save
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.weights import DrawnWeights
from herdkit.train import parallel
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from toy_adapters import MemoryAdapter, ToyConfig, VideoToy

TEXT = runpy.run_path(str(Path(__file__).parents[1] / "text" / "sharing.py"))


class Large:
    """Adapters whose layers are as wide as the language model's."""

    layers_at = ()

    def __init__(self, config, text):
        super().__init__(config, text)
        make = partial(GatedCrossAttention, text.dim, text.n_heads, text.n_kv_heads, text.ffn_dim)
        self.layers = interleaved_layers(self.modality, dict.fromkeys(range(1, text.n_layers, 2), make))

    def interleaved(self):
        return {int(i): layer for i, layer in self.layers.items()}


class LargeImage(Large, MemoryAdapter):
    kind = "large-image"


class LargeVideo(Large, VideoToy):
    kind = "large-video"


def made(adapter, text):
    torch.manual_seed(0)
    with without_memory(seed=5):
        return adapter(ToyConfig(), text)


def draw(tokenizer, to, sizes):
    config = TransformerConfig(**TEXT[sizes])
    with torch.device("meta"):
        text = Transformer(config)
    model = compose(text, tokenizer, image=made(LargeImage, config))
    part = share_out(model, DrawnWeights(config, seed=3), Place(ParallelConfig()), 16)
    save(model, to, shared=part.tensors())


def measure(small, start, to, layout):
    """Bytes by which resident memory grew at most while a model was read and written."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back
    place = Place(ParallelConfig(**layout))
    pass_through(small, to / "small", place)  # what is imported and allocated once
    return pass_through(start, to / "big", place)


def pass_through(start, to, place):
    found, grown = {}, TEXT["grown"]
    gc.collect()  # what the model before had

    def read():
        model, weights = open_model(start)
        model.attach(made(LargeVideo, model.text.config))
        return model, share_out(model, weights, place, 16)

    model, part = grown(found, "read", read)
    grown(found, "written", lambda: save(model, to, shared=part.tensors()))
    kept = {name: sum(parallel.local(p).nbytes for p in getattr(part.model, name).parameters()) for name in part.names}
    return found | {"kept": kept}


def main(calls, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    register_adapter("large-image", LargeImage)
    register_adapter("large-video", LargeVideo)
    with parallel.process_group():
        torch.save([globals()[name](**options) for name, options in calls], f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
