"""Tables as samples, one a row: CSV, JSON Lines and Parquet files whose columns hold the members of a sample, or the
paths of files that do.

    id,image,caption
    a1,photos/1.jpg,a red circle      Columns(key="id", files={"image": None}, texts={"caption": "txt"})
                                      makes the sample a1 with the members jpg and txt
"""

from __future__ import annotations

import csv
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .dialogs import parse_dialog
from .drafts import Draft, Problem
from .shards import ShardError, naming_problem

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_MAX_FIELD = 1 << 26
_BATCH = 64

Row = tuple[str, "dict[str, Any] | Problem"]
"""Where a row stands, and its values by column or why there are none."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a manifest become. Those that are not named here are together the member `json`, an object
    with a field for each: CSV's values as strings, Parquet's dates and times in ISO 8601.

    Args:
        key: column with the samples' keys, text or whole numbers; by default a sample's key is the number of its row
            over all manifests, from 0, in nine digits.
        files: columns with paths, relative to the manifest, and the extension that each gives to its member; None for
            that of the file itself.
        texts: columns with text, and the extension of the member that holds it as UTF-8.
        contents: columns of Parquet with the bytes of a file, or with a struct of `bytes` and `path` as the library
            `datasets` writes them; and the extension of the member, or None for that of the struct's path.
        dialog: column with messages (in CSV as JSON), see `herdkit.data.dialogs`, whose media parts hold paths,
            relative to the manifest. It becomes the field `messages` of the member `json`; the files become members
            under their own extensions, or as `0.jpg`, `1.jpg` where several in a dialog have the same one.
        dropped: columns to leave out.
        missing: what an empty or absent value of `files`, `texts` and `contents` means: "error", or "omit" for a sample
            without that member.
    """

    key: str | None = None
    files: Mapping[str, str | None] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, str | None] = field(default_factory=dict)
    dialog: str | None = None
    dropped: tuple[str, ...] = ()
    missing: Literal["error", "omit"] = "error"

    def __post_init__(self):
        if self.missing not in ("error", "omit"):
            raise ValueError(f"missing must be 'error' or 'omit', not {self.missing!r}")
        named = self.named()
        for column in named:
            if named.count(column) > 1:
                raise ValueError(f"column {column!r} is given two uses")
        for extension in (*self.files.values(), *self.texts.values(), *self.contents.values()):
            if extension is not None and (problem := naming_problem("0", [extension])):
                raise ValueError(problem.removeprefix("sample 0: "))

    def named(self) -> list[str]:
        """The columns that are named, in the order of the arguments."""
        single = [column for column in (self.key, self.dialog) if column is not None]
        return [*single, *self.files, *self.texts, *self.contents, *self.dropped]


class Manifest:
    """The samples of tables, in the order of their rows.

    Args:
        paths: .csv, .tsv, .jsonl, .ndjson or .parquet files; UTF-8, the first row of CSV has the columns' names.
        columns: what they become.
        delimiter: of CSV; "," by default, in a .tsv a tab.

    Going through it raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file; a header that is empty, not UTF-8 or has a name twice; a column that is named
            but that no row has.
        ModuleNotFoundError: Parquet without pyarrow; names the extra.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        columns: Columns | None = None,
        *,
        delimiter: str | None = None,
    ):
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        self.columns = columns or Columns()
        self.delimiter = delimiter
        if delimiter is not None and len(delimiter) != 1:
            raise ValueError(f"the delimiter of CSV is one character, not {delimiter!r}")
        for path in self.paths:
            if path.suffix.lower() not in SUFFIXES:
                raise ValueError(f"{path}: a manifest is a file that ends with {', '.join(SUFFIXES)}")
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")

    def __iter__(self) -> Iterator[Draft | Problem]:
        number = 0
        unseen = dict.fromkeys(self.columns.named())
        for path in self.paths:
            for where, row in self._rows(path):
                if isinstance(row, Problem):
                    yield row
                else:
                    for column in [column for column in unseen if column in row]:
                        del unseen[column]
                    yield _draft(where, row, self.columns, number, path.parent)
                number += 1
        if number and unseen:
            names = ", ".join(map(str, self.paths))
            raise ValueError(f"{names}: no row has the column {next(iter(unseen))!r}")

    def _rows(self, path: Path) -> Iterator[Row]:
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            return _csv_rows(path, self.delimiter or ("\t" if suffix == ".tsv" else ","), self.columns)
        return _parquet_rows(path, self.columns) if suffix == ".parquet" else _json_rows(path)


def _csv_rows(path: Path, delimiter: str, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))  # long documents are fields like any other
    # What is not UTF-8 is let through as surrogates, so that the row is found that it stands in.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = _header(path, reader, columns)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, Problem(where, "", f"no CSV: {error}")
                continue
            if not values:
                continue
            if not _is_unicode("".join(values)):
                yield where, Problem(where, "", "not UTF-8")
            elif len(values) != len(header):
                yield where, Problem(where, "", f"has {len(values)} fields, and the header {len(header)}")
            else:
                yield where, dict(zip(header, values, strict=True))


def _header(path: Path, reader: Iterator[list[str]], columns: Columns) -> list[str]:
    try:
        header = next(reader)
    except StopIteration:
        raise ValueError(f"{path}: empty, without even a header") from None
    except csv.Error as error:
        raise ValueError(f"{path}:1: the header is no CSV: {error}") from error
    if not _is_unicode("".join(header)):
        raise ValueError(f"{path}:1: the header is not UTF-8; convert the file")
    _check_header(path, header, columns)
    return header


def _check_header(path: Path, header: list[str], columns: Columns) -> None:
    for name in header:
        if not name or header.count(name) > 1:
            raise ValueError(f"{path}: the header has {f'{name!r} twice' if name else 'a column without a name'}")
    for name in columns.named():
        if name not in header:
            raise ValueError(f"{path}: no column {name!r}; its columns are {', '.join(map(repr, header))}")


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield where, Problem(where, "", f"not UTF-8: byte {error.start + 1} of the line")
            except (ValueError, RecursionError) as error:
                yield where, Problem(where, "", f"not JSON: {error}")
            else:
                known = isinstance(row, dict)
                yield where, row if known else Problem(where, "", f"an object is needed, not {type(row).__name__}")


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Parquet needs pyarrow: pip install "herdkit[parquet]"') from error
    number = 0
    try:
        with ParquetFile(path) as file:
            _check_header(path, file.schema_arrow.names, columns)
            wanted = [name for name in file.schema_arrow.names if name not in columns.dropped]
            for batch in file.iter_batches(_BATCH, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    if columns.dialog is not None:
                        row[columns.dialog] = _without_nulls(row[columns.dialog])
                    yield f"{path}: row {number}", row | dict.fromkeys(columns.dropped)
    except ArrowException as error:
        raise ShardError(f"{path}: cannot be read as Parquet after row {number}: {error}") from error
    except OSError as error:
        raise ShardError(f"{path}: cannot be read after row {number}: {error}") from error


def _without_nulls(value: Any) -> Any:
    """A table gives every part and message the fields of all others, as nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _draft(where: str, row: dict[str, Any], columns: Columns, number: int, folder: Path) -> Draft | Problem:
    key = ""
    try:
        key = f"{number:09d}" if columns.key is None else _key(row, columns.key)
        members = _Members(folder)
        for column, extension in columns.files.items():
            if (value := _value(row, column, columns)) is not None:
                members.add_file(_text(value, column), extension, f"column {column}")
        for column, extension in columns.texts.items():
            if (value := _value(row, column, columns)) is not None:
                members.add(extension, _text(value, column).encode())
        for column, extension in columns.contents.items():
            if (value := _value(row, column, columns)) is not None:
                members.add(*_content(value, extension, column))
        rest = {column: value for column, value in row.items() if column not in columns.named()}
        if columns.dialog is not None:
            if "messages" in rest:
                raise ValueError(f"the dialog of column {columns.dialog} takes the place of column messages; drop that")
            rest = {"messages": _dialog(row, columns.dialog, members), **rest}
        if rest:
            members.add("json", _json(rest))
        return Draft(where, key, members.found)
    except UnicodeEncodeError:
        return Problem(where, key, "not Unicode text: it holds a surrogate")
    except ValueError as error:
        return Problem(where, key, str(error))


class _Members:
    """The members of a sample under way, no two of one name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[str, Path | bytes] = {}

    def add(self, extension: str, content: Path | bytes) -> None:
        if extension in self.found:
            raise ValueError(f"two members are called {extension}; give one of them another extension")
        self.found[extension] = content

    def add_file(self, name: str, extension: str | None, where: str) -> None:
        self.add(extension or self.extension_of(name, where), self.folder / name)

    def extension_of(self, name: str, where: str) -> str:
        if "://" in name:
            raise ValueError(f"{where}: {name} is an address; download it first")
        if not (extension := Path(name).suffix[1:].lower()):
            raise ValueError(f"{where}: {name!r} has no extension; say which the member shall have")
        return extension


def _key(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        raise ValueError(f"no key: column {column} is {'empty' if column in row else 'not there'}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"column {column}: a key is text or a whole number, not {value!r}")
    return str(value)


def _value(row: dict[str, Any], column: str, columns: Columns) -> Any:
    value = row.get(column)
    if value is None or value == "":
        if columns.missing == "omit":
            return None
        raise ValueError(f"column {column} is {'empty' if column in row else 'not there'}")
    return value


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column} must hold text, not {type(value).__name__}")
    return value


def _content(value: Any, extension: str | None, column: str) -> tuple[str, bytes]:
    path = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        found = "none" if content is None or content == b"" else type(content).__name__
        raise ValueError(f"column {column} must hold the bytes of a file, and holds {found}")
    extension = extension or Path(path or "").suffix[1:].lower()
    if not extension:
        raise ValueError(f"column {column} does not tell the kind of file; say which extension the member shall have")
    return extension, content


def _dialog(row: dict[str, Any], column: str, members: _Members) -> list[dict[str, Any]]:
    """The messages with the members' extensions in place of paths; adds the files to the members."""
    messages = row.get(column)
    if messages is None or messages == "":
        raise ValueError(f"column {column} is {'empty' if column in row else 'not there'}")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column {column} is not JSON: {error}") from error
    dialog = parse_dialog(messages, f"column {column}")
    names: dict[str, str] = {}
    for message in dialog:
        for part in message.media:
            if not isinstance(part.media, str):
                raise ValueError(f"column {column}: {part.type} must be a path, not {type(part.media).__name__}")
            names.setdefault(part.media, members.extension_of(part.media, f"column {column}"))
    extensions = list(names.values())
    for number, (name, extension) in enumerate(names.items()):
        names[name] = extension if extensions.count(extension) == 1 else f"{number}.{extension}"
        members.add_file(name, names[name], f"column {column}")
    return [_with_names(message, names) for message in messages]


def _with_names(message: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        kind = part["type"]
        parts.append(part if kind == "text" else {**part, kind: names[part[kind]]})
    return {**message, "content": parts}


def _json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except UnicodeEncodeError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot become JSON: {error}") from error


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    hint = "; drop its column, or make a member of its own of it" if isinstance(value, bytes) else "; drop its column"
    raise TypeError(f"a value of type {type(value).__name__}{hint}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
