"""Tensors from files straight into a model's parameters, whole or the parts of them that a process keeps: what is in
memory at any time is those and the pages of the one tensor that is being read, of a PyTorch file those of the file.
Nothing is ever unpickled but tensors. And tensors into files, one after another."""

from __future__ import annotations

import functools
import json
import math
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...train.files import sync
from ...train.portions import Kind, Portion, Region, portions

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

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
        arrange: from the stored order of rows to ours; keeps the shape, unless `shape` is given.
        block: rows that `arrange` takes together; it may be called on any number of such blocks.
        shape: of the stored tensor, where it is another than that of the region; `arrange` goes from the one to the
            other, of the whole. Several pieces may take their part of one stored tensor then.
    """

    name: str
    target: str
    region: Region = ()
    arrange: Callable[[Tensor], Tensor] | None = None
    block: int = 1
    shape: Shape | None = None

    def read(self, opened: TensorFile, region: Region) -> Tensor:
        """A part of the stored tensor, in our order of rows."""
        if self.arrange is not None and self.shape is not None:
            return self.arrange(opened.read(self.name))[region]
        if self.arrange is None or not region:
            tensor = opened.read(self.name, region)
            return tensor if self.arrange is None else self.arrange(tensor)
        rows = region[0]
        first, last = rows.start // self.block * self.block, -(-rows.stop // self.block) * self.block
        blocks = self.arrange(opened.read(self.name, (slice(first, last), *region[1:])))
        return blocks[rows.start - first : rows.stop - first]


Pieces = Mapping[Path, Sequence[Piece]]
"""What is to be read, by file. A file with no pieces is opened as well: all that it holds is surplus."""


class TensorFile:
    """A file of tensors: safetensors, or a PyTorch file (`.pth`) that is mapped and holds nothing but tensors.

    Args:
        opened: its tensors, or the handle of `safe_open`, from whose file they are read.
    """

    def __init__(self, file: Path, opened: Any):
        self._file, self._opened = file, opened

    def names(self) -> Collection[str]:
        return self._opened.keys()

    def kind(self, name: str) -> tuple[Shape, torch.dtype | None]:
        """Shape and dtype of a tensor without reading it; the dtype is None where it is none that we know."""
        if isinstance(self._opened, dict):
            return tuple(self._opened[name].shape), self._opened[name].dtype
        view = self._opened.get_slice(name)
        return tuple(view.get_shape()), _DTYPES.get(view.get_dtype())

    def read(self, name: str, region: Region = ()) -> Tensor:
        """The tensor, or a part of it, backed by the file's pages."""
        if isinstance(self._opened, dict):
            return self._opened[name][region]
        # Of the handle at hand all pages that were ever read would stay.
        with safe_open(self._file, "pt") as fresh:
            return fresh.get_slice(name)[region] if region else fresh.get_tensor(name)


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
            yield TensorFile(file, handle)
        return
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ModelDirectoryError(f"{file}: not a whole PyTorch file of tensors alone ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ModelDirectoryError(f"{file}: holds something else than tensors by name")
    yield TensorFile(file, dict(tensors))


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
    write_tensors(file, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.items())


def write_tensors(file: Path, kinds: Mapping[str, Kind], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Likewise one after another, none of which is kept in memory.

    Args:
        kinds: shape and dtype of every tensor by name.
        tensors: each once, in any order, on any device.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, places = 0, {}
    # In the order of the safetensors library, which has large elements first to align them.
    for name, (shape, dtype) in sorted(kinds.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        places[name] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        start = out.tell()
        for name, tensor in tensors:
            assert (tuple(tensor.shape), tensor.dtype) == kinds[name]
            out.seek(start + places.pop(name))
            out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
    assert not places, f"nothing was written for {', '.join(places)}"
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
        ignored: names in the files that nobody needs, but where a piece of the same file asks for one.
        faults: what is known to be wrong already.

    Raises:
        ModelDirectoryError: names every tensor that is missing, surplus, ill-shaped, of an unfit type, not finite,
            or unlike its copy, and every file that is missing or cut short.
    """
    StoredTensors(pieces, module.state_dict(), ignored, faults).fill(module, dtype)


class StoredTensors:
    """Tensors in files, which are looked at here and read later.

    Args:
        pieces: that together make up all of `wanted`.
        wanted: by name, of the shape and dtype that they are to have, whole; any floating-point dtype will do where one
            is wanted.
        ignored, faults: as in `fill`.

    Attributes:
        faults: all that is known to be wrong.
    """

    def __init__(
        self,
        pieces: Pieces,
        wanted: Mapping[str, Tensor],
        ignored: Collection[str] = (),
        faults: Sequence[str] = (),
    ):
        self.faults = list(faults)
        self._sound: dict[Path, list[Piece]] = {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        self._dtypes: set[torch.dtype | None] = set()
        for file, group in pieces.items():
            try:
                with open_tensors(file) as opened:
                    unused = set(ignored) - {piece.name for piece in group}
                    kinds = {name: opened.kind(name) for name in opened.names() if name not in unused}
            except ModelDirectoryError as error:
                self.faults.append(f"{error}, and should hold {_span(group)}")
                continue
            self._sound[file] = _fitting(file, group, kinds, wanted, self.faults)
            self._dtypes |= {stored for _, stored in kinds.values()}

    def fill(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Fills a whole module; see the function of this name."""
        state = module.state_dict()
        if self.faults:
            self.read(None)
        elif any(tensor.is_meta for tensor in state.values()):
            module.to(dtype or _widest(self._dtypes)).to_empty(device="cpu")
            state = module.state_dict()
        self.read(portions(state))

    def read(self, into: Mapping[str, Portion] | None) -> None:
        """Fills what a process keeps of some of the tensors. Of the others nothing is read.

        Args:
            into: by name; None reads everything to find what is wrong with it.

        Raises:
            ModelDirectoryError: see `fill`; what is wrong with the numbers, in what was read of them.
        """
        faults = list(self.faults)
        first: dict[tuple, str] = {}
        for file, group in self._sound.items():
            if into is not None and into.keys().isdisjoint(piece.target for piece in group):
                continue
            with open_tensors(file) as opened:
                for piece in group:
                    if into is None:
                        found = opened.read(piece.name)
                    elif piece.target not in into or (cut := self._cut(piece, into[piece.target].region)) is None:
                        continue
                    else:
                        found = into[piece.target].tensor[cut.kept]
                        stored = piece.read(opened, cut.stored)
                        key = (piece.target, *((part.start, part.stop) for part in piece.region))
                        if key not in first:
                            first[key] = f"{piece.name} in {file.name}"
                            found.copy_(stored)
                        elif not torch.equal(found, stored.to(found)):
                            faults.append(f"{file}: {piece.name} differs from {first[key]}, of which it is a copy")
                    if not _finite(found):
                        faults.append(f"{file}: {piece.name} holds values that are not finite in {found.dtype}")
        if faults:
            raise ModelDirectoryError("; ".join(faults))

    def _cut(self, piece: Piece, kept: Region) -> _Cut | None:
        """Where what a process keeps of a tensor and what a piece has of it are the same; None: nowhere."""
        sizes = self._shapes[piece.target]
        stored = *piece.region, *(slice(0, size) for size in sizes[len(piece.region) :])
        both = []
        for whole, mine, its in zip(sizes, kept, stored, strict=True):
            start, stop, _ = its.indices(whole)
            both.append((max(start, mine.start), min(stop, mine.stop), mine.start, start))
        if any(start >= stop for start, stop, _, _ in both):
            return None
        return _Cut(
            tuple(slice(start - mine, stop - mine) for start, stop, mine, _ in both),
            tuple(slice(start - its, stop - its) for start, stop, _, its in both),
        )


class _Cut(NamedTuple):
    """Part of a tensor, in the coordinates of what a process keeps and in those of a stored piece."""

    kept: Region
    stored: Region


def _fitting(
    file: Path,
    group: Sequence[Piece],
    kinds: Mapping[str, tuple[Shape, torch.dtype | None]],
    state: Mapping[str, Tensor],
    faults: list[str],
) -> list[Piece]:
    """The pieces of one file that are there and fit; what does not is added to `faults`."""
    wanted = {piece.name: piece.shape or tuple(state[piece.target][piece.region].shape) for piece in group}
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
