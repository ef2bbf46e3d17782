"""Trains a toy composed model whose language model is stored in shards; a program for `finish_program`."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from herdkit.adapters import ModalityBatch, Placements, compose
from herdkit.adapters.batching import Batch
from herdkit.adapters.objective import next_token
from herdkit.adapters.stage import stored_in_shards
from herdkit.text.rows import TokenBatch
from herdkit.train import OptimizerConfig, ScheduleConfig, TrainerConfig, parallel, train
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from toy_adapters import TEXT, MemoryAdapter, SoftAdapter, ToyConfig, randomise, text_model

FOREVER, ROWS, LENGTH, STEPS = torch.iinfo(torch.int64).max, 4, 12, 3
SEES, HEARS = [(2, 0), (2, 1), (3, 2)], [(1, 0)]
"""(row, update) with an image, with sound: the rows 0 have neither, so that their process has no input at all."""


class Rows:
    def __init__(self, group, groups):
        self.rows = range(group * ROWS // groups, (group + 1) * ROWS // groups)
        self.given = 0

    def __iter__(self):
        while True:
            self.given += 1
            yield batch_of(self.rows, self.given - 1)

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def draw(*seed):
    return torch.Generator().manual_seed(sum(part * 100**i for i, part in enumerate(seed)))


def batch_of(rows, update):
    tokens = torch.stack([torch.randint(0, 290, (LENGTH,), generator=draw(row, update)) for row in rows])
    inputs = {}
    for modality, kind, where, span in (("image", MemoryAdapter, SEES, 1), ("speech", SoftAdapter, HEARS, 2)):
        here = [(i, row) for i, row in enumerate(rows) if (row, update) in where]
        if not here:
            continue
        items = [torch.randn(3 - span + 1, 6, dtype=torch.float64, generator=draw(row, update, 7)) for _, row in here]
        columns = torch.tensor([(i, 3, span, FOREVER, number) for number, (i, _) in enumerate(here)]).unbind(1)
        placements = Placements(**dict(zip(("row", "start", "length", "end", "input"), columns, strict=True)))
        inputs[modality] = ModalityBatch(kind(ToyConfig(), TEXT).prepare(items), placements)
    return Batch(TokenBatch(tokens, tokens.roll(-1, 1)), inputs)


def run(run_dir, layout):
    place = Place(ParallelConfig(**layout))
    kinds = (MemoryAdapter, SoftAdapter)
    adapters = {kind.modality: randomise(kind(ToyConfig(), TEXT), seed=i + 1) for i, kind in enumerate(kinds)}
    model = compose(text_model(), **adapters)
    with stored_in_shards(model, place):
        result = train(
            model,
            Rows(place.data, place.layout.data),
            next_token,
            trainer=TrainerConfig(steps=STEPS, batch_size=ROWS),
            optimizer=OptimizerConfig(lr=1e-3),
            schedule=ScheduleConfig(),
            run_dir=run_dir,
            place=place,
        )
    return {"weights": model.state_dict(), "loss": result["mean"]["loss"], "grad_norm": result["last"]["grad_norm"]}


def main(runs, run_dir, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        found = {name: run(Path(run_dir) / name, layout) for name, layout in runs.items()}
        torch.save(found, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
