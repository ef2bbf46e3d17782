"""Pre-training and what goes on from it, by a recipe on one of several processes; a program for `finish_program`."""

import json
import os
from importlib import import_module
from pathlib import Path

import torch
from herdkit.train import parallel


def main(recipe, run_dir, environ, stage="pretrain"):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        result = import_module(f"herdkit.text.{stage}").run(recipe, Path(run_dir))
        if parallel.rank() == 0:
            (Path(run_dir) / "returned.json").write_text(json.dumps(result))


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
