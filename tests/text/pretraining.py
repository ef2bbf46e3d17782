"""Pre-training by a recipe on one of several processes; a program for `finish_program`."""

import os
from pathlib import Path

import torch
from herdkit.text.pretrain import run
from herdkit.train import parallel


def main(recipe, run_dir, environ):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        run(recipe, Path(run_dir))


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
