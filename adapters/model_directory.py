"""Composed models in model directories: the language model's files (`herdkit.text.model_directory`) and one
safetensors file for each adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..text.model_directory import (
    ModelDirectoryError,
    dataclass_from_dict,
    load_part,
    load_text,
    read_config,
    save_part,
    write_config,
    writing,
)
from .compose import ComposedModel
from .registry import adapter_class


def save(model: ComposedModel, path: str | os.PathLike) -> Path:
    """Writes a model directory, whole or not at all.

    Raises:
        ValueError: the model has no tokenizer.
        FileExistsError: `path` exists and is no model directory, which is never overwritten.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; give one to compose(..., tokenizer=...) before saving")
    with writing(path) as fresh:
        save_part(model.text, fresh / "text.safetensors")
        model.tokenizer.save(fresh / "tokenizer.json")
        adapters = {}
        for name, adapter in model.adapters.items():
            save_part(adapter, fresh / f"{name}.safetensors")
            adapters[name] = {"type": adapter.kind, "config": dataclasses.asdict(adapter.config)}
        write_config(fresh, {"text": dataclasses.asdict(model.text.config), "adapters": adapters})
    return Path(path)


def load(path: str | os.PathLike, adapters: Sequence[str] | None = None) -> ComposedModel:
    """The model of a directory, in eval mode on the CPU.

    Args:
        path: a directory that `save` wrote.
        adapters: the modalities to attach; all by default.

    Raises:
        ModelDirectoryError: no such directory, an unreadable or unknown file, an adapter nobody registered,
            tensors that are missing, surplus, ill-shaped or not finite.
    """
    path = Path(path)
    text, tokenizer = load_text(path)
    model = ComposedModel(text, tokenizer)
    _attach(model, path, adapters)
    return model.eval()


def attach_adapters(model: ComposedModel, path: str | os.PathLike, adapters: Sequence[str] | None = None) -> None:
    """Attaches the adapters of another model directory to a model: senses that were trained apart come together.

    Args:
        model: changed in place.
        path: a directory that `save` wrote; its language model must be that of `model`, weight for weight.
        adapters: the modalities to attach; None for all that `model` has not. They come to its device and mode.

    Raises:
        ModelDirectoryError: as `load`, and where the language models differ or nothing is left to attach.
    """
    path = Path(path)
    other, _ = load_text(path)
    ours, theirs = model.text.state_dict(), other.state_dict()
    if model.text.config != other.config or not all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours):
        raise ModelDirectoryError(f"{path}: its adapters were trained for another language model than this one")
    if adapters is None:
        adapters = [name for name in read_config(path)["adapters"] if name not in model.adapters]
    if not adapters:
        raise ModelDirectoryError(f"{path} has no adapter that this model has not; it has {list(model.adapters)}")
    _attach(model, path, adapters)


def _attach(model: ComposedModel, path: Path, adapters: Sequence[str] | None) -> None:
    config = read_config(path)
    if missing := set(adapters or ()) - set(config["adapters"]):
        raise ModelDirectoryError(f"{path} has no adapter {sorted(missing)}; it has {list(config['adapters'])}")
    for name, entry in config["adapters"].items():
        if adapters is not None and name not in adapters:
            continue
        try:
            kind = adapter_class(entry["type"])
            adapter_config = dataclass_from_dict(kind.config_class, entry["config"], f"adapters.{name}.config.")
            adapter = kind(adapter_config, model.text.config)
        except (LookupError, ValueError) as error:
            raise ModelDirectoryError(f"{path / 'config.json'}: adapter {name!r}: {error}") from error
        load_part(adapter, path / f"{name}.safetensors")
        model.attach(adapter.to(model.text.tok_embeddings.weight.device).train(model.training))
