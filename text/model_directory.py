"""The model directory: `config.json`, one safetensors file for each part, `tokenizer.json`. Parts can be
swapped, shared and downloaded alone. Here is the language model's side; `herdkit.adapters.model_directory`
adds the adapters."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .model import Transformer, TransformerConfig
from .tokenizer import Tokenizer

FORMAT = "herdkit"
VERSION = 1


class ModelDirectoryError(ValueError):
    """A model directory that cannot be read; the message names the file, the key and what to do."""


def save_text(model: Transformer, tokenizer: Tokenizer, path: str | os.PathLike) -> Path:
    """Writes a model directory of the language model alone; see `writing`."""
    with writing(path) as fresh:
        save_part(model, fresh / "text.safetensors")
        tokenizer.save(fresh / "tokenizer.json")
        write_config(fresh, {"text": dataclasses.asdict(model.config), "adapters": {}})
    return Path(path)


def load_text(path: str | os.PathLike) -> tuple[Transformer, Tokenizer]:
    """The language model and tokenizer of a model directory; its adapters are left alone.

    Raises:
        ModelDirectoryError: see `read_config` and `load_part`.
    """
    path = Path(path)
    config = read_config(path)
    try:
        model = Transformer(dataclass_from_dict(TransformerConfig, config["text"], "text."))
    except ValueError as error:
        raise ModelDirectoryError(f"{path / 'config.json'}: {error}") from error
    load_part(model, path / "text.safetensors")
    return model.eval(), load_tokenizer(path)


def load_tokenizer(path: Path) -> Tokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ModelDirectoryError(f"{path / 'tokenizer.json'}: missing")
    return Tokenizer.load(path / "tokenizer.json")


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A fresh directory to fill, which takes the place of `path` at the end: whole or not at all.

    Raises:
        FileExistsError: `path` exists and is no model directory, which is never overwritten.
    """
    path = Path(path)
    if path.exists() and not (path / "config.json").is_file():
        raise FileExistsError(f"{path} exists and is no model directory; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        fresh = Path(work) / "new"
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(Path(work) / "old")
        fresh.rename(path)


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=2)
    (path / "config.json").write_text(text + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a model directory.

    Raises:
        ModelDirectoryError: no such directory, or its `config.json` is missing, no JSON, or of another format.
    """
    if not path.is_dir():
        raise ModelDirectoryError(f"{path}: no such model directory")
    file = path / "config.json"
    if not file.is_file():
        raise ModelDirectoryError(f"{path}: no config.json in it, so this is no model directory")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelDirectoryError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ModelDirectoryError(f"{file}: not a herdkit model ('format' is not {FORMAT!r})")
    if config.get("version") != VERSION:
        raise ModelDirectoryError(f"{file}: version {config.get('version')}, this herdkit reads {VERSION}")
    for key in ("text", "adapters"):
        if not isinstance(config.get(key), dict):
            raise ModelDirectoryError(f"{file}: {key!r} is missing or no object")
    return config


def save_part(part: nn.Module, file: Path) -> None:
    """One part's parameters and buffers as safetensors; equal weights give equal bytes."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in part.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def load_part(part: nn.Module, file: Path) -> None:
    """Loads what `save_part` wrote.

    Raises:
        ModelDirectoryError: names the file and every missing, surplus, ill-shaped or non-finite tensor.
    """
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise ModelDirectoryError(f"{file}: missing") from None
    except SafetensorError as error:
        raise ModelDirectoryError(f"{file}: not a whole safetensors file ({error})") from error
    expected = part.state_dict()
    faults = [f"missing {name}" for name in expected if name not in tensors]
    faults += [f"surplus {name}" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            faults.append(f"{name} holds values that are not finite")
    if faults:
        raise ModelDirectoryError(f"{file}: " + "; ".join(faults))
    part.load_state_dict(tensors)


def dataclass_from_dict(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """A config dataclass, nested ones and tuples included, from what `dataclasses.asdict` and JSON made of it.

    Raises:
        ValueError: an unknown or missing key, with its path and the nearest known key.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if unknown := set(values) - set(known):
        name = min(unknown)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {sorted(known)}"
        raise ValueError(f"unknown key {where + name!r} for {cls.__name__}; {hint}")
    absent = [f for name, f in known.items() if name not in values]
    if missing := [f.name for f in absent if f.default is f.default_factory is dataclasses.MISSING]:
        raise ValueError(f"{cls.__name__} needs {', '.join(repr(where + name) for name in missing)}")
    return cls(**{name: _convert(hints[name], value, f"{where}{name}.") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType) and value is not None:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(options[0], value, where) if len(options) == 1 else value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and value is not None:
        return dataclass_from_dict(hint, value, where)
    if (hint is tuple or origin is tuple) and value is not None:
        return tuple(value)
    return value
