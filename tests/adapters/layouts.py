"""Trains a toy composed model on a layout after another; a program for `finish_program`."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from herdkit.adapters import ModalityBatch, Placements, compose
from herdkit.adapters.batching import Batch
from herdkit.adapters.contract import InputLoss
from herdkit.adapters.distribute import share_out
from herdkit.adapters.objective import next_token
from herdkit.text.rows import IGNORE, TokenBatch
from herdkit.text.weights import HeldWeights
from herdkit.train import FreezeRule, OptimizerConfig, ScheduleConfig, TrainerConfig, parallel, train
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_adapters import TEXT, MemoryAdapter, SoftAdapter, ToyConfig, VideoToy, randomise, text_model


class WidthAdapter(MemoryAdapter):
    """With a loss of its own, that of each entry's size."""

    def forward(self, batch):
        given = super().forward(batch)
        memory = given.memory.to(torch.promote_types(given.memory.dtype, torch.float32))
        sizes = (memory.square().mean(-1) * given.memory_mask).sum(1)
        return replace(given, losses={"size_loss": InputLoss(sizes, batch["lengths"], 0.3)})


FOREVER, ROWS, LENGTH, STEPS = torch.iinfo(torch.int64).max, 8, 16, 3
KINDS = {"image": WidthAdapter, "speech": SoftAdapter, "video": VideoToy}
SPANS = {"image": 1, "speech": 3, "video": 1}
STANDS = {
    # By modality, update and row: the columns where its inputs stand, and how long they are seen.
    "image": {0: {2: [(3, 8), (8, FOREVER)], 7: [(0, FOREVER)]}, 1: {2: [(11, FOREVER)]}, 2: {6: [(5, 15)]}},
    "speech": {0: {1: [(2, 0), (6, 0)]}, 2: {5: [(7, 0)]}},
    "video": {0: {4: [(1, FOREVER)]}, 1: {2: [(4, FOREVER)]}},
}
"""Rows 0 and 3 have no input at all, nor has a whole half of the rows in the second and in the third update."""


class Rows:
    def __init__(self, batch_of, group, groups, accumulate, updates):
        self.batch_of = batch_of
        self.group, self.groups, self.size, self.given = group, groups, ROWS // groups // accumulate, 0
        self.accumulate, self.last = accumulate, None if updates is None else updates * accumulate

    def __iter__(self):
        while True:
            if self.given == self.last:
                raise KeyboardInterrupt
            update, number = divmod(self.given, self.accumulate)
            first = (number * self.groups + self.group) * self.size
            self.given += 1
            yield self.batch_of(range(first, first + self.size), update)

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def draw(*seed):
    return torch.Generator().manual_seed(sum(part * 100**i for i, part in enumerate(seed)))


def batch_of(rows, update):
    lengths = [LENGTH - 4 * (row % 2) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE)
    documents = torch.zeros_like(tokens)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[i, :length] = torch.randint(0, 290, (length,), generator=draw(row, update))
        labels[i, : length - 1 - row % 3] = tokens[i, 1 : length - row % 3]
        documents[i, length:] = 1
    inputs = {name: found for name in KINDS if (found := inputs_of(name, rows, update)) is not None}
    return Batch(TokenBatch(tokens, labels, documents if 3 in rows else None), inputs)


def inputs_of(modality, rows, update):
    items, found, span = [], [], SPANS[modality]
    for i, row in enumerate(rows):
        for column, end in STANDS[modality].get(update, {}).get(row, []):
            found.append((i, column, span, end, len(items)))
            length = span if span > 1 else 2 + column % 3
            items.append(torch.randn(length, 6, dtype=torch.float64, generator=draw(row, update, column)))
    if not items:
        return None
    columns = torch.tensor(found).unbind(1)
    placements = Placements(**dict(zip(("row", "start", "length", "end", "input"), columns, strict=True)))
    return ModalityBatch(KINDS[modality](ToyConfig(), TEXT).prepare(items), placements)


def make_model(dtype):
    adapters = {name: randomise(kind(ToyConfig(), TEXT), seed=i + 1) for i, (name, kind) in enumerate(KINDS.items())}
    return compose(text_model(), **adapters).to(dtype)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(
    run_dir,
    layout,
    accumulate=1,
    freeze=(),
    dtype="float64",
    stop_after=None,
    precision="float32",
    checkpoint_every=1,
    make_model=make_model,
    batch_of=batch_of,
    objective=next_token,
):
    """The gradients of every update, and of the weights at the end those that this process writes, by name; None where
    it stopped before."""
    place = Place(ParallelConfig(**layout))
    model = make_model(getattr(torch, dtype))
    updates = []
    part = share_out(model, HeldWeights.of(model.text), place, LENGTH, objective)
    names = {id(p): name for name, p in part.model.named_parameters()}

    def record(optimizer, _args, _kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        updates.append({names[id(p)]: whole(p.grad).clone() for p in parameters if p.grad is not None})

    hook = register_optimizer_step_pre_hook(record)
    try:
        result = train(
            part.model,
            Rows(batch_of, place.data, place.layout.data, accumulate, stop_after),
            part.objective,
            trainer=TrainerConfig(
                steps=STEPS,
                batch_size=ROWS,
                accumulate=accumulate,
                checkpoint_every=checkpoint_every,
                precision=precision,
            ),
            optimizer=OptimizerConfig(lr=1e-3),
            schedule=ScheduleConfig(),
            freeze=[FreezeRule(pattern=pattern, trainable=False) for pattern in freeze],
            run_dir=run_dir,
            place=place,
            pipeline=part.pipeline,
        )
    except KeyboardInterrupt:
        return None
    finally:
        hook.remove()
    weights = {
        f"{name}.{key}": tensor.clone()
        for name, tensors in part.tensors().items()
        for key, tensor in tensors.of_file(list(tensors.kinds))
    }
    keep = ("tokens", "parameters", "trained_parameters")
    return {
        "updates": updates,
        "weights": weights,
        "last": result["last"],
        "mean": result["mean"],
        **{key: result[key] for key in keep},
    }


def main(runs, run_dir, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        found = {name: run(Path(run_dir) / name.partition("/")[0], **options) for name, options in runs.items()}
        torch.save(found, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
