"""A run of the toy in which one process goes wrong; a program for `torchrun`, and for `conftest.start`."""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from herdkit.train import parallel, train
from torch.optim.optimizer import register_optimizer_step_post_hook


def load_toys():
    spec = importlib.util.spec_from_file_location("train_toys", Path(__file__).with_name("toys.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flip_bit(tensor):
    """Flips the lowest bit of the last element."""
    tensor.detach().view(-1).view(torch.int32)[-1] ^= 1


def fail():
    raise ValueError("the culprit is here")


class SlowLoader:
    def __init__(self, loader, seconds):
        self.loader, self.seconds = loader, seconds

    def __iter__(self):
        for batch in self.loader:
            time.sleep(self.seconds)
            yield batch

    def __getattr__(self, name):
        return getattr(self.loader, name)


def main(run_dir, fault=None, rank=1, at=0, environ=None, out=None, errors=None, steps=12, trainer=None, seconds=0.0):
    """
    Args:
        fault: "raise", "kill", "terminate" (torchrun), "stall", "flip" (a bit of a weight) or "flip-moment", before
            update `at` (from 0 on) of process `rank`, or "slow" at all of them; torchrun's later starts are whole.
        seconds: of the stall, or of waiting for each batch of the slow loader.
        out: gets the weights; errors: a file for standard error; ".RANK" follows both.
    """
    torch.set_num_threads(1)
    os.environ.update(environ or {})
    toys = load_toys()
    if errors:
        sys.stderr = Path(f"{errors}.{os.environ.get('RANK', '0')}").open("w", buffering=1)  # noqa: SIM115
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    mine = first_start and int(os.environ.get("RANK", "0")) == rank
    acts = {
        "raise": fail,
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "terminate": lambda: os.kill(os.getppid(), signal.SIGTERM),
        "stall": lambda: time.sleep(seconds),
        "flip": lambda: flip_bit(model.text.norm.weight),
        "flip-moment": lambda: flip_bit(optimizers[0].state[model.text.norm.weight]["exp_avg"]),
    }
    optimizers = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    act = acts.get(fault) if mine else None
    if not first_start and os.environ["RANK"] == "1":
        time.sleep(1)  # the other finds what the store holds of the start before
    with parallel.process_group():
        model = toys.Toy(0.3)
        settings = toys.configs(steps, trainer={"log_every": 2, **(trainer or {})})
        world = parallel.world_size()
        loader = toys.ToyLoader(settings["trainer"].micro_batch_size(world), parallel.rank(), world)
        if fault == "slow" and mine:
            loader = SlowLoader(loader, seconds)
        objective = toys.at_step(at, act) if act else toys.objective
        try:
            train(model, loader, objective, run_dir=run_dir, **settings)
        except RuntimeError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise
        finally:
            hook.remove()
        if out:
            torch.save(model.state_dict(), f"{out}.{parallel.rank()}")


if __name__ == "__main__":
    main(**(globals()["arguments"] if "arguments" in globals() else json.loads(sys.argv[1])))
