"""The model directory: `config.json`, one safetensors file for each part, `tokenizer.json`. Parts can be
swapped, shared and downloaded alone. Here is the language model's side; `herdkit.adapters.model_directory`
adds the adapters. Language models in the layouts of others are loaded and saved as well."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .interchange.huggingface import load_huggingface, save_huggingface
from .interchange.meta import PARAMS, load_meta, save_meta
from .interchange.tensor_files import ModelDirectoryError, Piece, fill, read_json, save_tensors, write_json
from .model import Transformer, TransformerConfig
from .tokenizer import RANKS_FILE, Tokenizer

FORMAT = "herdkit"
VERSION = 1

Layout = Literal["herdkit", "huggingface", "meta"]
LAYOUTS: tuple[Layout, ...] = typing.get_args(Layout)


def save_text(
    model: Transformer,
    tokenizer: Tokenizer | None,
    path: str | os.PathLike,
    layout: Layout = "herdkit",
    *,
    max_shard_bytes: int = 5_000_000_000,
    model_parallel: int = 1,
) -> Path:
    """Writes a directory of the language model alone, whole or not at all; see `writing`.

    Args:
        layout: ours; "huggingface", for transformers and vLLM; or "meta", as Meta's code reads it.
        max_shard_bytes: in Hugging Face's layout, the largest file, unless one tensor is larger.
        model_parallel: in Meta's layout, the number of files.

    Raises:
        ValueError: an unknown layout, or one that has no place for this model or tokenizer; no tokenizer for ours.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    with writing(path) as fresh:
        if layout == "huggingface":
            save_huggingface(model, tokenizer, fresh, max_shard_bytes)
        elif layout == "meta":
            save_meta(model, tokenizer, fresh, model_parallel)
        elif tokenizer is None:
            raise ValueError("a herdkit model directory needs a tokenizer")
        else:
            save_part(model, fresh / "text.safetensors")
            tokenizer.save(fresh / "tokenizer.json")
            write_config(fresh, {"text": dataclasses.asdict(model.config), "adapters": {}})
    return Path(path)


def load_text(path: str | os.PathLike, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """`load_model`, for those that need a tokenizer.

    Raises:
        ModelDirectoryError: as `load_model`, and where there is no tokenizer.
    """
    model, tokenizer = load_model(path, dtype)
    if tokenizer is None:
        raise ModelDirectoryError(f"{path}: no tokenizer.json and no {RANKS_FILE} in it")
    return model, tokenizer


def load_model(path: str | os.PathLike, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    """The language model of a directory in any of the layouts, in eval mode on the CPU, and its tokenizer; the
    adapters of ours are left alone. Meta's files may lie in a directory `original` of it.

    Besides the model, no more memory is taken than the largest file has.

    Args:
        dtype: of the parameters; None for that of the files.

    Raises:
        ModelDirectoryError: see `read_config`, `load_huggingface`, `load_meta` and `fill`; or the tokenizer is none
            of Llama 3's, or has more tokens than the model.
    """
    path = Path(path)
    layout, path = find_layout(path)
    if layout == "huggingface":
        model = load_huggingface(path, dtype)
    elif layout == "meta":
        model = load_meta(path, dtype)
    else:
        config = read_config(path)
        try:
            with torch.device("meta"):
                model = Transformer(dataclass_from_dict(TransformerConfig, config["text"], "text."))
        except ValueError as error:
            raise ModelDirectoryError(f"{path / 'config.json'}: {error}") from error
        load_part(model, path / "text.safetensors", dtype)
    try:
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError:
        return model.eval(), None
    except ValueError as error:
        raise ModelDirectoryError(str(error)) from error
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model's vocabulary {model.config.vocab_size}"
        raise ModelDirectoryError(f"{path}: the tokenizer has {sizes}")
    return model.eval(), tokenizer


def find_layout(path: Path) -> tuple[Layout, Path]:
    """The layout of a directory, and where in it the files are.

    Raises:
        ModelDirectoryError: no such directory, or it is in none of the layouts.
    """
    if not path.is_dir():
        raise ModelDirectoryError(f"{path}: no such model directory")
    if (path / "config.json").is_file():
        # Every Hugging Face model names its type; ours names its format.
        is_ours = "model_type" not in read_json(path / "config.json")
        return ("herdkit" if is_ours else "huggingface"), path
    for place in (path, path / "original"):
        if (place / PARAMS).is_file():
            return "meta", place
    raise ModelDirectoryError(f"{path}: no config.json in it and no {PARAMS}, so this is no model directory")


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A fresh directory to fill, which takes the place of `path` at the end: whole or not at all.

    Raises:
        FileExistsError: `path` exists and is no model directory, which is never overwritten.
    """
    path = Path(path)
    if path.exists() and not any((path / name).is_file() for name in ("config.json", PARAMS)):
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
    write_json(path / "config.json", {"format": FORMAT, "version": VERSION, **content})


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a model directory of ours.

    Raises:
        ModelDirectoryError: it is missing, no JSON, or of another format.
    """
    file = path / "config.json"
    config = read_json(file)
    if config.get("format") != FORMAT:
        raise ModelDirectoryError(f"{file}: not a herdkit model ('format' is not {FORMAT!r})")
    if config.get("version") != VERSION:
        raise ModelDirectoryError(f"{file}: version {config.get('version')}, this herdkit reads {VERSION}")
    for key in ("text", "adapters"):
        if not isinstance(config.get(key), dict):
            raise ModelDirectoryError(f"{file}: {key!r} is missing or no object")
    return config


def save_part(part: nn.Module, file: Path) -> None:
    """One part's parameters and buffers as safetensors; equal weights give equal bytes."""
    save_tensors(part.state_dict(), file)


def load_part(part: nn.Module, file: Path, dtype: torch.dtype | None = None) -> None:
    """Loads what `save_part` wrote; the part and the dtype as in `herdkit.text.interchange.tensor_files.fill`.

    Raises:
        ModelDirectoryError: names the file and every missing, surplus, ill-shaped or non-finite tensor.
    """
    fill(part, {file: [Piece(name, name) for name in part.state_dict()]}, dtype=dtype)


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
