"""A toy model, loader and objective for the tests of `train`. As a program (see `conftest.start`) it is a run
in a process of its own, which a test can kill."""

import os
import signal
import sys
from pathlib import Path

import torch
from herdkit.train import (
    FreezeRule,
    OptimizerConfig,
    RunDirectoryError,
    ScheduleConfig,
    TrainerConfig,
    checkpoint,
    latest_complete,
    parallel,
    train,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

RUN_DIRECTORY_ERROR = 77  # exit code
VOCABULARY, WIDTH, LENGTH = 11, 16, 6


class Core(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("seen", torch.zeros(()))  # changes while training
        self.register_buffer("scale", torch.ones(()), persistent=False)


class Toy(nn.Module):
    """Predicts tokens, with an image vector added where the sample has one; `unused` is never touched."""

    def __init__(self, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.text = Core(dropout)
        self.image = nn.Sequential(nn.Linear(4, WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))
        self.unused = nn.Linear(3, 3)

    def forward(self, tokens, images, has_image):
        hidden = self.text.embedding(tokens)
        if has_image.any():
            rows = has_image.nonzero()[:, 0]
            image = self.image(images[rows])[:, None].expand(-1, LENGTH, -1)
            hidden = hidden.index_add(0, rows, image.to(hidden.dtype))
        if self.text.training:
            self.text.seen += 1
        return self.text.output(self.text.dropout(self.text.norm(hidden)))


def sample(position, dtype, images):
    generator = torch.Generator().manual_seed(1000 + position)
    tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
    targets = tokens[1:].clone()
    targets[int(torch.randint(1, LENGTH + 1, (), generator=generator)) :] = -100  # ragged numbers of targets
    return {
        "tokens": tokens[:-1],
        "targets": targets,
        "images": torch.randn(4, generator=generator, dtype=torch.float64).to(dtype),
        "has_image": torch.tensor(position in images),
    }


class ToyLoader:
    """Batch s of rank r is the positions from s * batch * world + r * batch on; the rest at `end` is shared out."""

    def __init__(self, batch_size, rank=0, world_size=1, dtype=torch.float32, images=range(10**6), end=None):
        self.batch_size, self.rank, self.world_size, self.dtype = batch_size, rank, world_size, dtype
        self.images, self.end = images, end
        self.consumed = 0

    def __iter__(self):
        while self.end is None or self.consumed < self.end:
            count = self.batch_size * self.world_size
            if self.end is not None:
                count = min(count, self.end - self.consumed)
            first, last = (self.consumed + count * rank // self.world_size for rank in (self.rank, self.rank + 1))
            self.consumed += count
            samples = [sample(position, self.dtype, self.images) for position in range(first, last)]
            yield {key: torch.stack([s[key] for s in samples]) for key in samples[0]} if samples else None

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["consumed"]


def objective(model, batch):
    logits = model(batch["tokens"], batch["images"], batch["has_image"])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    counted = batch["targets"] != -100
    right = ((logits.argmax(-1) == batch["targets"]) & counted).sum()
    metrics = {"accuracy": (right, counted.sum())}
    if batch["has_image"].any():
        metrics["images"] = (batch["has_image"].sum(), 1)
    return loss, counted.sum(), metrics


def configs(steps=12, trainer=None, optimizer=None, schedule=None):
    trainer = {"batch_size": 8, "checkpoint_every": 4, "log_every": 3, "keep": 2, **(trainer or {})}
    return {
        "trainer": TrainerConfig(steps=steps, **trainer),
        "optimizer": OptimizerConfig(**{"lr": 1e-2, **(optimizer or {})}),
        "schedule": ScheduleConfig(**{"warmup_steps": 3, **(schedule or {})}),
    }


def at_step(number, act):
    """The objective, but `act` is called before micro-batch `number` (from 0 on) of this process."""
    calls = 0

    def wrapped(model, batch):
        nonlocal calls
        if calls == number:
            act()
        calls += 1
        return objective(model, batch)

    return wrapped


def signal_self(number):
    os.kill(os.getpid(), number)


def kill_at_call(module, name, number):
    """Replaces a function of a module by one that kills the process at its call `number` (from 0 on)."""
    function, calls = getattr(module, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        if calls == number:
            signal_self(signal.SIGKILL)
        calls += 1
        return function(*args, **kwargs)

    setattr(module, name, wrapped)


def recorded_gradients():
    """A list that gets the gradients of every update, as the optimizer sees them."""
    updates = []

    def record(optimizer, _args, _kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        updates.append([None if g is None else g.clone() for g in gradients])

    return updates, register_optimizer_step_pre_hook(record)


def main(
    mode,
    run_dir,
    steps=12,
    dropout=0.3,
    number=0,
    environ=None,
    out=None,
    dtype="float32",
    images=None,
    end=None,
    trainer=None,
):
    torch.set_num_threads(1)
    os.environ.update(environ or {})
    if mode == "kill-in-save":
        kill_at_call(checkpoint, "sync", number)
    if mode == "kill-in-delete":
        kill_at_call(checkpoint.shutil, "rmtree", number)
    signals = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
    if os.environ.get("RANK", "0") == "0":
        signals["terminate-first"] = signal.SIGTERM
    act = (lambda: signal_self(signals[mode])) if mode in signals else lambda: None
    dtype = getattr(torch, dtype)
    with parallel.process_group():
        world = parallel.world_size()
        updates, hook = recorded_gradients()
        # Of the weights that train, those of the first process count.
        model = Toy(dropout, seed=parallel.rank())
        model.image[0].load_state_dict(Toy().image[0].state_dict())
        model = model.to(dtype)
        settings = configs(
            steps,
            trainer={"evaluate_every": 4, **(trainer or {})},
            optimizer={"clip_norm": None} if mode == "gradients" else None,
        )
        loader = ToyLoader(
            settings["trainer"].micro_batch_size(world),
            parallel.rank(),
            world,
            dtype,
            range(10**6) if images is None else images,
            end,
        )
        result = train(
            model,
            loader,
            at_step(number, act),
            run_dir=run_dir,
            freeze=[FreezeRule(pattern="image.0.*", trainable=False)] if mode != "gradients" else [],
            evaluate=lambda m, step: {"random": torch.rand(()).item()},
            **settings,
        )
        hook.remove()
        if out:
            saved = {"updates": updates, "model": model.state_dict(), "result": result}
            saved["newest"] = str(latest_complete(Path(run_dir)))
            torch.save(saved, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    try:
        main(**globals()["arguments"])
    except RunDirectoryError:
        sys.exit(RUN_DIRECTORY_ERROR)
