"""Trains a tiny language model on a layout after another; a program for `finish_program`."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from herdkit.text import Transformer, TransformerConfig
from herdkit.text.distribute import distribute, of_own_positions
from herdkit.text.objective import next_token
from herdkit.text.rows import IGNORE, TokenBatch
from herdkit.train import FreezeRule, OptimizerConfig, ScheduleConfig, TrainerConfig, parallel, train
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from herdkit.train.portions import portions
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROWS, LENGTH, VOCABULARY, STEPS = 8, 16, 32, 3


def make_model(tied=False, layers=4):
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=32, n_layers=layers, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=VOCABULARY, max_seq_len=LENGTH,
        tie_embeddings=tied,
    )  # fmt: skip
    return Transformer(config)


class Rows:
    """Rows of several documents each, the same for any layout."""

    def __init__(self, group, groups, accumulate, updates, packed=True):
        self.packed = packed
        self.group, self.groups, self.size, self.given = group, groups, ROWS // groups // accumulate, 0
        self.last = None if updates is None else updates * accumulate

    def __iter__(self):
        while True:
            if self.given == self.last:
                raise KeyboardInterrupt
            first = self.given * self.size * self.groups + self.group * self.size
            self.given += 1
            batch = make_rows(range(first, first + self.size))
            yield batch if self.packed else replace(batch, documents=None)

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def make_rows(numbers):
    tokens, labels, documents = [], [], []
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        tokens.append(torch.randint(VOCABULARY, (LENGTH,), generator=draw))
        documents.append((torch.rand(LENGTH, generator=draw) < 0.2).cumsum(0))
        labels.append(tokens[-1].roll(-1))
        labels[-1][torch.rand(LENGTH, generator=draw) < 0.3] = IGNORE  # ragged numbers of targets
    return TokenBatch(torch.stack(tokens), torch.stack(labels), torch.stack(documents))


def parts(tensors):
    """What this process has of each, and where in the whole that stands."""
    found = portions(tensors)
    return {name: (part.tensor.clone(), [(s.start, s.stop) for s in part.region]) for name, part in found.items()}


def run(
    run_dir, layout, dtype="float64", tied=False, accumulate=1, stop_after=None, freeze=(), steps=STEPS, packed=True,
    **trainer,
):  # fmt: skip
    """This process's parts of the gradients of every update and of the final weights, by name; None where it stopped
    before its end."""
    place = Place(ParallelConfig(**layout))
    model = make_model(tied).to(getattr(torch, dtype))
    pipeline = distribute(model, place)
    names = {id(p): name for name, p in model.named_parameters()}
    updates = []

    def record(optimizer, _args, _kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        updates.append(parts({names[id(p)]: p.grad for p in parameters if p.grad is not None}))

    hook = register_optimizer_step_pre_hook(record)
    try:
        result = train(
            model,
            Rows(place.data, place.layout.data, accumulate, stop_after, packed),
            of_own_positions(next_token, place),
            trainer=TrainerConfig(steps=steps, batch_size=ROWS, accumulate=accumulate, **trainer),
            optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
            schedule=ScheduleConfig(warmup_steps=1),
            freeze=[FreezeRule(pattern=pattern, trainable=False) for pattern in freeze],
            run_dir=run_dir,
            place=place,
            pipeline=pipeline,
        )
    except KeyboardInterrupt:
        return None
    finally:
        hook.remove()
    return {
        "updates": updates,
        "weights": parts(dict(model.named_parameters())),
        "last": result["last"],
        "tokens": result["tokens"],
        "graphs": counters["stats"]["unique_graphs"],  # compiled by this process so far
    }


def main(runs, run_dir, out, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        found = {name: run(Path(run_dir) / name.partition("/")[0], **options) for name, options in runs.items()}
        torch.save(found, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
