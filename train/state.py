"""What a checkpoint holds of a run in memory: trained parameters, changing buffers, AdamW's moments, random
number generators; and a fingerprint of what it does not hold, the frozen parameters."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, parallel
from .checkpoint import CheckpointError
from .freezing import changing_buffers

SAMPLED = 256  # values of each frozen parameter that enter its fingerprint


def capture(model: nn.Module, optimizer: torch.optim.Optimizer, trained: Sequence[str]) -> dict[str, Tensor]:
    """Everything that training changes, by name: "model.*", "buffer.*" and "optimizer.*"."""
    tensors = _weights(model, trained)
    parameters = dict(model.named_parameters())
    for name in trained:
        for key, value in optimizer.state[parameters[name]].items() if parameters[name] in optimizer.state else ():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trained: Sequence[str]) -> None:
    """Puts a checkpoint into a model and an optimizer that are built for it, on whatever layout it was made. All
    processes call it.

    Raises:
        CheckpointError: its names, shapes or dtypes are not those of the model; the message names them.
    """
    weights = _weights(model, trained)
    stored = checkpoint.describe_tensors(path)
    everywhere = set(chain.from_iterable(parallel.gather(list(weights))))
    surplus = [name for name in stored if not name.startswith("optimizer.") and name not in everywhere]
    if surplus:
        raise CheckpointError(
            f"checkpoint {path} does not fit: {', '.join(surplus[:8])} would not be trained in this model"
        )
    tensors = dict(weights)
    parameters = dict(model.named_parameters())
    moments: dict[str, dict[str, Tensor]] = {}
    for full, (shape, dtype) in stored.items():
        if full.startswith("optimizer."):
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            if name not in parameters:  # of another stage of the pipeline
                continue
            tensors[full] = _empty_moment(parameters[name], shape, dtype)
            moments.setdefault(name, {})[key] = tensors[full]
    checkpoint.load_tensors(path, tensors)
    for name, state in moments.items():
        optimizer.state[parameters[name]] = state


def _empty_moment(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for what the optimizer keeps of a parameter: shared out as the parameter is, or a number."""
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts the parameters and buffers of a checkpoint into a model, in place, without the rest of the run.

    Raises:
        CheckpointError: it is damaged, or the model lacks a name, or has another shape or dtype.
    """
    damage = checkpoint.find_damage(path)
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}")
    own = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    own |= {f"buffer.{name}": b for name, b in model.named_buffers()}
    stored = [name for name in checkpoint.describe_tensors(path) if not name.startswith("optimizer.")]
    absent = [name for name in stored if name not in own]
    if absent:
        raise CheckpointError(f"checkpoint {path} does not fit: the model has no {', '.join(absent[:8])}")
    checkpoint.load_tensors(path, {name: own[name] for name in stored})


def _weights(model: nn.Module, trained: Sequence[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    tensors = {f"model.{name}": parameters[name].detach() for name in trained}
    return tensors | {f"buffer.{name}": b for name, b in changing_buffers(model, trained).items()}


def fingerprint(model: nn.Module, trained: Sequence[str]) -> dict[str, str]:
    """A short hash of each parameter that never trains, over shape, dtype and a sample of its values: enough
    to notice that a run is resumed on top of other frozen weights, cheap for billions of them. All processes
    call it."""
    never = dict(model.named_parameters())
    for name in trained:
        del never[name]
    hashes = {}
    for name, parameter in never.items():
        flat = parallel.whole(parameter.detach()).reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].contiguous().cpu()
        content = f"{tuple(parameter.shape)} {parameter.dtype}".encode() + sample.view(torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()[:16]
    return hashes


def require_same_frozen(path: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    """Raises:
    CheckpointError: the frozen parameters are not those that the checkpoint was trained with.
    """
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        raise CheckpointError(
            f"checkpoint {path} was trained with other frozen parameters: {', '.join(differing[:4])} differ"
            f"{f' and {len(differing) - 4} more' if len(differing) > 4 else ''}; load those before training"
        )


def seed_everything(seed: int, *path: int) -> None:
    """Seeds torch, numpy and python, each on its own, from a seed and a path of numbers (process, update)."""
    words = np.random.SeedSequence([seed, *path]).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))


def capture_random() -> dict[str, Any]:
    """The state of torch's, numpy's and python's generators as JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Puts the generators back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


@contextmanager
def same_random_afterwards() -> Iterator[None]:
    """What runs inside draws random numbers without a trace."""
    state = capture_random()
    try:
        yield
    finally:
        restore_random(state)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
