"""Tensors from files straight into a model's parameters, file by file: what is in memory at any time is the
model and the pages of the one file that is being read. Nothing is ever unpickled but tensors."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...train.files import sync

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}

Shape = tuple[int, ...]


class ModelDirectoryError(ValueError):
    """A model directory that cannot be read; the message names the file, the key and what to do."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor and the parameter that it fills, or fills a part of.

    Args:
        name: of the tensor in its file.
        target: name of the parameter.
        region: the part of the parameter; () is the whole. Pieces with the same target and region are copies
            of one another: the first is loaded, the others must equal it.
        arrange: from the stored order of rows to ours; keeps the shape.
    """

    name: str
    target: str
    region: tuple[slice, ...] = ()
    arrange: Callable[[Tensor], Tensor] | None = None


Pieces = Mapping[Path, Sequence[Piece]]
"""What is to be read, by file. A file with no pieces is opened as well: all that it holds is surplus."""


class TensorFile:
    """An open file of tensors: safetensors, or a PyTorch file (`.pth`) that is mapped and holds nothing but
    tensors."""

    def __init__(self, file: Any):
        self._file = file

    def names(self) -> Collection[str]:
        return self._file.keys()

    def kind(self, name: str) -> tuple[Shape, torch.dtype | None]:
        """Shape and dtype of a tensor without reading it; the dtype is None where it is none that we know."""
        if isinstance(self._file, dict):
            return tuple(self._file[name].shape), self._file[name].dtype
        view = self._file.get_slice(name)
        return tuple(view.get_shape()), _DTYPES.get(view.get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor, backed by the file's pages."""
        return self._file[name] if isinstance(self._file, dict) else self._file.get_tensor(name)


@contextmanager
def open_tensors(file: Path) -> Iterator[TensorFile]:
    """Opens a file of tensors.

    Raises:
        ModelDirectoryError: the file is missing, cut short, or no such file; a PyTorch file that holds anything
            but tensors by name.
    """
    if not file.is_file():
        raise ModelDirectoryError(f"{file}: missing")
    if file.suffix != ".pth":
        try:
            opened = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ModelDirectoryError(f"{file}: not a whole safetensors file ({error})") from error
        with opened as handle:
            yield TensorFile(handle)
        return
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ModelDirectoryError(f"{file}: not a whole PyTorch file of tensors alone ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ModelDirectoryError(f"{file}: holds something else than tensors by name")
    yield TensorFile(dict(tensors))


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ModelDirectoryError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelDirectoryError(f"{file}: missing") from None
    except ValueError as error:
        raise ModelDirectoryError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelDirectoryError(f"{file}: holds {type(content).__name__}, not an object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(file)


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a config that a stranger wrote; a default stands for an absent key and for null.

    Raises:
        KeyError: there is none, and no default. ValueError: it is something else.
    """
    value = config[key] if default is None else config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return value


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Tensors as safetensors, durable; equal tensors give equal bytes."""
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})
    sync(file)


def shape_faults(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """One line for each tensor that is missing, surplus or ill-shaped."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"surplus {name}" for name in found if name not in wanted]
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            faults.append(f"{name} has shape {found[name]}, expected {shape}")
    return faults


def fill(
    module: nn.Module,
    pieces: Pieces,
    *,
    dtype: torch.dtype | None = None,
    ignored: Collection[str] = (),
    faults: Sequence[str] = (),
) -> None:
    """Fills a module's parameters and buffers from files.

    Args:
        module: on the meta device, where it gets its memory here, and only when all that is stored fits; or on any
            other, where tensors keep their dtype. Of no use after an error.
        pieces: that together fill the module's whole state.
        dtype: of the floating-point tensors of a module on the meta device; None for that of the files, the
            widest where they differ.
        ignored: names in the files that nobody needs.
        faults: what is known to be wrong already.

    Raises:
        ModelDirectoryError: names every tensor that is missing, surplus, ill-shaped, of an unfit type, not finite,
            or unlike its copy, and every file that is missing or cut short.
    """
    faults = list(faults)
    state = module.state_dict()
    sound: dict[Path, list[Piece]] = {}
    dtypes: set[torch.dtype | None] = set()
    for file, group in pieces.items():
        try:
            with open_tensors(file) as opened:
                kinds = {name: opened.kind(name) for name in opened.names() if name not in ignored}
        except ModelDirectoryError as error:
            faults.append(f"{error}, and should hold {_span(group)}")
            continue
        sound[file] = _fitting(file, group, kinds, state, faults)
        dtypes |= {stored for _, stored in kinds.values()}
    fits = not faults
    if fits and any(tensor.is_meta for tensor in state.values()):
        module.to(dtype or _widest(dtypes)).to_empty(device="cpu")
        state = module.state_dict()
    first: dict[tuple, str] = {}
    for file, group in sound.items():
        with open_tensors(file) as opened:
            for piece in group:
                tensor = opened.read(piece.name)
                if fits:
                    place = state[piece.target][piece.region]
                    tensor = tensor if piece.arrange is None else piece.arrange(tensor)
                    key = (piece.target, *((part.start, part.stop) for part in piece.region))
                    if key not in first:
                        first[key] = f"{piece.name} in {file.name}"
                        place.copy_(tensor)
                    elif not torch.equal(place, tensor.to(place)):
                        faults.append(f"{file}: {piece.name} differs from {first[key]}, of which it is a copy")
                    tensor = place
                if not _finite(tensor):
                    faults.append(f"{file}: {piece.name} holds values that are not finite in {tensor.dtype}")
    if faults:
        raise ModelDirectoryError("; ".join(faults))


def _fitting(
    file: Path,
    group: Sequence[Piece],
    kinds: Mapping[str, tuple[Shape, torch.dtype | None]],
    state: Mapping[str, Tensor],
    faults: list[str],
) -> list[Piece]:
    """The pieces of one file that are there and fit; what does not is added to `faults`."""
    wanted = {piece.name: tuple(state[piece.target][piece.region].shape) for piece in group}
    found = {name: shape for name, (shape, _) in kinds.items()}
    faults += [f"{file}: {fault}" for fault in shape_faults(wanted, found)]
    fitting = []
    for piece in group:
        if found.get(piece.name) != wanted[piece.name]:
            continue
        stored, expected = kinds[piece.name][1], state[piece.target].dtype
        if stored == expected or (stored in FLOATING and expected in FLOATING):
            fitting.append(piece)
        else:
            faults.append(f"{file}: {piece.name} is of type {stored or 'unknown'}, expected {expected}")
    return fitting


def _widest(dtypes: Collection[torch.dtype | None]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [dtype for dtype in dtypes if dtype in FLOATING])


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _span(pieces: Sequence[Piece]) -> str:
    if len(pieces) < 2:
        return "".join(piece.name for piece in pieces) or "nothing"
    return f"{len(pieces)} tensors, {pieces[0].name} to {pieces[-1].name}"
