"""The model directory: `config.json`, one safetensors file for each part, `tokenizer.json`. Parts can be
swapped, shared and downloaded alone. Here is the language model's side; `herdkit.adapters.model_directory`
adds the adapters. Language models in the layouts of others are loaded and saved as well."""

from __future__ import annotations

import dataclasses
import difflib
import os
import shutil
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..train import parallel
from ..train.files import sync
from .interchange.directory_weights import StoredWeights, TrainedWeights
from .interchange.huggingface import open_huggingface, save_huggingface
from .interchange.meta import PARAMS, open_meta, save_meta
from .interchange.tensor_files import (
    ModelDirectoryError,
    Piece,
    StoredTensors,
    fill,
    read_json,
    save_tensors,
    write_json,
)
from .model import Transformer, TransformerConfig
from .tokenizer import RANKS_FILE, Tokenizer

FORMAT = "herdkit"
VERSION = 1
WEIGHTS = "text.safetensors"

T = TypeVar("T")

Layout = Literal["herdkit", "huggingface", "meta"]
LAYOUTS: tuple[Layout, ...] = typing.get_args(Layout)


def save_text(
    model: Transformer | TrainedWeights,
    tokenizer: Tokenizer | None,
    path: str | os.PathLike,
    layout: Layout = "herdkit",
    *,
    max_shard_bytes: int = 5_000_000_000,
    model_parallel: int = 1,
) -> Path:
    """Writes a directory of the language model alone, whole or not at all; see `writing`. No process has more of the
    model in memory than before and one tensor, in Meta's layout one file.

    Args:
        model: in this process, or the weights of one that several processes share, who all call it.
        layout: ours; "huggingface", for transformers and vLLM; or "meta", as Meta's code reads it.
        max_shard_bytes: in Hugging Face's layout, the largest file, unless one tensor is larger.
        model_parallel: in Meta's layout, the number of files.

    Raises:
        ValueError: an unknown layout, or one that has no place for this model or tokenizer; no tokenizer for ours.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if layout == "herdkit" and tokenizer is None:
        raise ValueError("a herdkit model directory needs a tokenizer")
    weights = TrainedWeights.of(model)
    with writing(path, together=weights.tensors.shared) as fresh:
        if layout == "huggingface":
            save_huggingface(weights, tokenizer, fresh, max_shard_bytes)
        elif layout == "meta":
            save_meta(weights, tokenizer, fresh, model_parallel)
        else:
            weights.write(fresh / WEIGHTS)
            if weights.first and tokenizer is not None:
                tokenizer.save(fresh / "tokenizer.json")
                write_config(fresh, {"text": dataclasses.asdict(weights.config), "adapters": {}})
    return Path(path)


def open_text(path: str | os.PathLike) -> tuple[StoredWeights, Tokenizer]:
    """The weights of a language model in any of the layouts, to be read by what shares them out, and its tokenizer; see
    `load_text`.

    Raises:
        ModelDirectoryError: as `load_text`, but for what is wrong with the files of the weights: reading them says it.
    """
    weights, tokenizer = _open(Path(path))
    if tokenizer is None:
        raise ModelDirectoryError(f"{path}: no tokenizer.json and no {RANKS_FILE} in it")
    return weights, tokenizer


def load_text(path: str | os.PathLike, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """`load_model`, for those that need a tokenizer.

    Raises:
        ModelDirectoryError: as `load_model`, and where there is no tokenizer.
    """
    weights, tokenizer = open_text(path)
    return weights.load(dtype).eval(), tokenizer


def load_model(path: str | os.PathLike, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    """The language model of a directory in any of the layouts, in eval mode on the CPU, and its tokenizer; the
    adapters of ours are left alone. Meta's files may lie in a directory `original` of it.

    Besides the model, no more memory is taken than the largest tensor has, of Meta's files the largest file.

    Args:
        dtype: of the parameters; None for that of the files.

    Raises:
        ModelDirectoryError: see `read_config`, `load_huggingface`, `load_meta` and `fill`; or the tokenizer is none
            of Llama 3's, or has more tokens than the model.
    """
    weights, tokenizer = _open(Path(path))
    return weights.load(dtype).eval(), tokenizer


def _open(path: Path) -> tuple[StoredWeights, Tokenizer | None]:
    layout, path = find_layout(path)
    if layout == "huggingface":
        weights = open_huggingface(path)
    elif layout == "meta":
        weights = open_meta(path)
    else:
        content = read_config(path)
        try:
            config = dataclass_from_dict(TransformerConfig, content["text"], "text.")
        except ValueError as error:
            raise ModelDirectoryError(f"{path / 'config.json'}: {error}") from error
        with torch.device("meta"):
            state = Transformer(config).state_dict()
        pieces = {path / WEIGHTS: [Piece(name, name) for name in state]}
        weights = StoredWeights(config, StoredTensors(pieces, state))
    try:
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError:
        return weights, None
    except ValueError as error:
        raise ModelDirectoryError(str(error)) from error
    if tokenizer.vocab_size > weights.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model's vocabulary {weights.config.vocab_size}"
        raise ModelDirectoryError(f"{path}: the tokenizer has {sizes}")
    return weights, tokenizer


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
def writing(path: str | os.PathLike, together: bool = False) -> Iterator[Path]:
    """A fresh directory to fill, which takes the place of `path` at the end: whole or not at all.

    Args:
        together: all processes call it, and fill the directory together; they share a file system.

    Raises:
        FileExistsError: `path` exists and is no model directory, which is never overwritten.
    """
    path = Path(path)
    on_first = parallel.on_first if together else _call
    work = Path(on_first(lambda: _begin(path)))
    fresh = work / "new"
    try:
        yield fresh
        if together:
            parallel.barrier()
        on_first(lambda: _take_place(path, work))
    finally:
        if not together or parallel.rank() == 0:
            shutil.rmtree(work, ignore_errors=True)


def _call(function: Callable[[], T]) -> T:
    return function()


def _begin(path: Path) -> str:
    if path.exists() and not any((path / name).is_file() for name in ("config.json", PARAMS)):
        raise FileExistsError(f"{path} exists and is no model directory; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    (Path(work) / "new").mkdir()
    return work


def _take_place(path: Path, work: Path) -> None:
    sync(work / "new")
    if path.exists():
        path.rename(work / "old")
    (work / "new").rename(path)
    sync(path.parent)


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
