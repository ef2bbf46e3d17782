"""Composed models in model directories: the language model's files (`herdkit.text.model_directory`) and one
safetensors file for each adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..text.interchange.directory_weights import write
from ..text.interchange.tensor_files import Piece, StoredTensors
from ..text.model import TransformerConfig
from ..text.model_directory import (
    Layout,
    ModelDirectoryError,
    dataclass_from_dict,
    find_layout,
    load_model,
    open_text,
    read_config,
    save_text,
    write_config,
    writing,
)
from ..text.tokenizer import Tokenizer
from ..text.weights import HeldWeights, Weights
from ..train.parallel import rank
from ..train.portions import WholeTensors
from .batching import Port
from .compose import ComposedModel
from .contract import Adapter
from .deferred import read_adapter, read_layers, without_memory
from .layouts import layout_for, layout_of
from .registry import adapter_class


def save(
    model: ComposedModel,
    path: str | os.PathLike,
    layout: Layout = "herdkit",
    *,
    max_shard_bytes: int = 5_000_000_000,
    model_parallel: int = 1,
    shared: Mapping[str, WholeTensors] | None = None,
) -> Path:
    """Writes a model directory, whole or not at all.

    Args:
        layout: ours, or one of others, "huggingface" and "meta": for language models alone, and for those with the
            adapters that `herdkit.adapters.layouts` knows to write (an image adapter: Llama 3.2 Vision).
        max_shard_bytes, model_parallel: of those, see `herdkit.text.model_directory.save_text`.
        shared: in our layout, the tensors of "text" and of each adapter by modality, where several processes share
            them, who then all call it; `model` tells what else there is to write, and its own tensors are left alone.

    Raises:
        ValueError: an unknown layout, or one that has no place for this model; or our layout, and the model has no
            tokenizer.
        FileExistsError: `path` exists and is no model directory, which is never overwritten.
    """
    if layout != "herdkit":
        sizes = {"max_shard_bytes": max_shard_bytes, "model_parallel": model_parallel}
        if not model.modalities:
            return save_text(model.text, model.tokenizer, path, layout, **sizes)
        writer = layout_for(layout, model)
        with writing(path) as fresh:
            writer.save(model, fresh, **sizes)
        return Path(path)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; give one to compose(..., tokenizer=...) before saving")
    parts = {"text": model.text, **model.adapters}
    tensors = shared or {name: WholeTensors(part.state_dict()) for name, part in parts.items()}
    with writing(path, together=shared is not None) as fresh:
        for name in parts:
            write(tensors[name], fresh / f"{name}.safetensors")
        if shared is None or rank() == 0:
            model.tokenizer.save(fresh / "tokenizer.json")
            configs = {name: dataclasses.asdict(adapter.config) for name, adapter in model.adapters.items()}
            adapters = {n: {"type": adapter.kind, "config": configs[n]} for n, adapter in model.adapters.items()}
            write_config(fresh, {"text": dataclasses.asdict(model.text.config), "adapters": adapters})
    return Path(path)


def load(
    path: str | os.PathLike, adapters: Sequence[str] | None = None, *, dtype: torch.dtype | None = None
) -> ComposedModel:
    """The model of a directory, in eval mode on the CPU.

    Args:
        path: a directory that `save` wrote, or a Llama 3 or Llama 3.2 Vision in Hugging Face's layout or in Meta's
            (see `herdkit.text.model_directory.load_model` and `herdkit.adapters.layouts`).
        adapters: the modalities to attach; all by default.
        dtype: of the parameters; None for that of the language model's files.

    Raises:
        ModelDirectoryError: no such directory, an unreadable or unknown file, an adapter nobody registered,
            tensors that are missing, surplus, ill-shaped or not finite.
    """
    path = Path(path)
    found = layout_of(path)
    if found is None:
        model = ComposedModel(*load_model(path, dtype))
        _attach(model, path, adapters)
        return model.eval()
    layout, place = found
    model = layout.load(place, dtype)
    if missing := set(adapters or ()) - set(model.modalities):
        raise ModelDirectoryError(f"{path} has no adapter {sorted(missing)}; it has {model.modalities}")
    for name in [name for name in reversed(model.modalities) if adapters is not None and name not in adapters]:
        model.detach(name)
    return model.eval()


def open_model(path: str | os.PathLike) -> tuple[ComposedModel, Weights]:
    """The model of a directory for training, in float32, and the weights of its language model, which is on the meta
    device: what shares the model out reads them, as those of the adapters' layers that can do without memory until then
    (`herdkit.adapters.deferred`). Of layouts that are read whole (`ComposedLayout.open`) all is in memory.

    Raises:
        ModelDirectoryError: as `load`, but for what is wrong with the language model's weights: reading them says it.
    """
    path = Path(path)
    if (found := layout_of(path)) is not None:
        model, weights = found[0].open(found[1])
        return model.eval(), weights
    weights, tokenizer = open_text(path)
    model = ComposedModel(weights.outline(), tokenizer)
    _attach(model, path, None)
    return model.eval(), weights


def attach_adapters(
    model: ComposedModel,
    path: str | os.PathLike,
    adapters: Sequence[str] | None = None,
    *,
    other_weights: bool = False,
    weights: Weights | None = None,
) -> None:
    """Attaches the adapters of another model directory to a model: senses that were trained apart come together.

    Args:
        model: changed in place.
        path: a directory that `save` wrote, or a Llama 3.2 Vision, for its image adapter; its language model must be
            that of `model`, weight for weight.
        adapters: the modalities to attach; None for all that `model` has not. They come to its device and mode.
        other_weights: only the sizes and the tokens of the language models must be equal, as where one is the finetuned
            other.
        weights: of the language model, where `model` has it on the meta device.

    Raises:
        ModelDirectoryError: as `load`, and where the language models or their tokenizers differ, or nothing is left
            to attach.
    """
    path = Path(path)
    found = layout_of(path)
    donor, own = None, weights or HeldWeights.of(model.text)
    if found is None:
        stored, tokenizer = open_text(path)
    else:
        donor, stored = found[0].open(found[1])
        tokenizer = donor.tokenizer
    if not (own.config == stored.config if other_weights else own.equal(stored)):
        raise ModelDirectoryError(f"{path}: its adapters were trained for another language model than this one")
    if tokenizer is not None and model.tokenizer is not None and not tokenizer.same_tokens(model.tokenizer):
        raise ModelDirectoryError(f"{path}: its adapters were trained with other tokens than those of this model")
    names = list(_adapter_configs(path)) if donor is None else donor.modalities
    chosen = [name for name in names if name not in model.adapters] if adapters is None else adapters
    if not chosen:
        raise ModelDirectoryError(f"{path} has no adapter that this model has not; it has {list(model.adapters)}")
    if donor is None:
        _attach(model, path, chosen)
        return
    if missing := set(chosen) - set(names):
        raise ModelDirectoryError(f"{path} has no adapter {sorted(missing)}; it has {names}")
    for name, adapter in donor.adapters.items():
        if name in chosen:
            if not model.text.tok_embeddings.weight.is_meta:
                read_layers(adapter.interleaved().values(), torch.device("cpu"))
            _join(model, adapter)


def load_ports(path: str | os.PathLike) -> tuple[Tokenizer, list[Port]]:
    """What makes batches for the model of a directory: its tokenizer and the ports of its adapters. No weights are
    read, and the adapters take no memory.

    Raises:
        ModelDirectoryError: no such directory, an unreadable or unknown configuration, no tokenizer.
    """
    if (found := layout_of(Path(path))) is not None:
        model = found[0].build(found[1])
        if model.tokenizer is None:
            raise ModelDirectoryError(f"{path}: no tokenizer can be read: there is none")
        return model.tokenizer, [Port.of(adapter) for adapter in model.adapters.values()]
    layout, path = find_layout(Path(path))
    try:
        tokenizer = Tokenizer.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise ModelDirectoryError(f"{path}: no tokenizer can be read: {error}") from error
    if layout != "herdkit":
        return tokenizer, []
    config = read_config(path)
    try:
        text = dataclass_from_dict(TransformerConfig, config["text"], "text.")
    except ValueError as error:
        raise ModelDirectoryError(f"{path / 'config.json'}: {error}") from error
    with torch.device("meta"):
        return tokenizer, [Port.of(_build(path, name, entry, text)) for name, entry in config["adapters"].items()]


def _attach(model: ComposedModel, path: Path, adapters: Sequence[str] | None) -> None:
    configs = _adapter_configs(path)
    if missing := set(adapters or ()) - set(configs):
        raise ModelDirectoryError(f"{path} has no adapter {sorted(missing)}; it has {list(configs)}")
    for name, entry in configs.items():
        if adapters is not None and name not in adapters:
            continue
        with without_memory() if model.text.tok_embeddings.weight.is_meta else nullcontext():
            adapter = _build(path, name, entry, model.text.config)
        state = adapter.state_dict()
        pieces = {path / f"{name}.safetensors": [Piece(key, key) for key in state]}
        read_adapter(adapter, StoredTensors(pieces, state))
        _join(model, adapter)


def _join(model: ComposedModel, adapter: Adapter) -> None:
    """Attaches an adapter, of the language model's dtype, mode and, where that is on one, device."""
    weight = model.text.tok_embeddings.weight
    adapter = adapter.to(dtype=weight.dtype, device=None if weight.is_meta else weight.device)
    model.attach(adapter.train(model.training))


def _build(path: Path, name: str, entry: dict[str, Any], text: TransformerConfig) -> Adapter:
    try:
        kind = adapter_class(entry["type"])
        return kind(dataclass_from_dict(kind.config_class, entry["config"], f"adapters.{name}.config."), text)
    except (LookupError, ValueError) as error:
        raise ModelDirectoryError(f"{path / 'config.json'}: adapter {name!r}: {error}") from error


def _adapter_configs(path: Path) -> dict[str, Any]:
    """The adapters of a directory by modality; the layouts of others have none."""
    return read_config(path)["adapters"] if find_layout(path)[0] == "herdkit" else {}
