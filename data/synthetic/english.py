"""Real English prose that every Python installation holds: the language reference, licences, docstrings,
comments."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

MIN_CHARS, MAX_CHARS = 200, 1200

_SKIPPED = {"site-packages", "lib2to3", "pydoc_data", "config", "__pycache__"}
_ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
_MARKUP = re.compile(r"``?|\*\*?")
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)
_BULLET = re.compile(r"^(?:[-*+o]|\(?[0-9a-z]{1,3}[.)]) +")
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_PROSE = re.compile(r"[A-Za-z\"'(][\x20-\x7e]*[.!?:;,)]$")
_ODD = re.compile(r"[^A-Za-z ,.'()\"-]")


def english_documents(max_bytes: int) -> list[str]:
    """Documents of 200 to 1200 characters of prose, about `max_bytes` in all, always in the same order.

    Read from source text, never imported: `pydoc_data.topics`, licence files of the installed distributions,
    docstrings and comments of the standard library. The same wherever Python and the packages are the same.
    """
    documents: list[str] = []
    size = 0
    seen: set[str] = set()
    for text in _sources():
        for document in _documents(text, seen):
            documents.append(document)
            size += len(document) + 1
            if size >= max_bytes:
                return documents
    return documents


def is_held_out(index: int) -> bool:
    """Whether a document of `english_documents`, by its place, is for tests: every fiftieth."""
    return index % 50 == 25


def _sources() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    topics = ast.parse((library / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in ast.walk(topics):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > MIN_CHARS:
            yield node.value
    yield from _licences()
    for folder in (library, *sorted(path for path in library.iterdir() if path.is_dir())):
        if folder.name in _SKIPPED:
            continue
        for path in sorted(folder.glob("*.py") if folder == library else folder.rglob("*.py")):
            if "test" not in str(path.relative_to(library)):
                # The docstrings of one module stand together: most are too short for a document of their own.
                source = path.read_bytes()
                comments = _COMMENTS.findall(source.decode("utf-8", errors="replace"))
                yield "\n\n".join((*_docstrings(ast.parse(source).body), *map(_uncommented, comments)))


def _uncommented(block: str) -> str:
    return "\n".join(line.strip().lstrip("#").strip() for line in block.splitlines())


def _docstrings(body: list[ast.stmt]) -> Iterator[str]:
    """Those of a module, its classes and their functions, in the order of the file."""
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        text = body[0].value.value
        if isinstance(text, str):
            yield inspect.cleandoc(text)
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(node.body)


def _licences() -> Iterator[str]:
    installed = {d.metadata["Name"]: d for d in metadata.distributions()}
    for name in sorted(installed, key=str.lower):
        for file in installed[name].files or ():
            if "dist-info" in str(file) and re.match(r"(licen[cs]e|copying|notice)", file.name.lower()):
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path.read_text(encoding="utf-8", errors="replace")


def _documents(text: str, seen: set[str]) -> Iterator[str]:
    """Neighbouring prose paragraphs of one text, joined up to `MAX_CHARS`; no paragraph twice."""
    held = ""
    for block in re.split(r"\n\s*\n", text):
        paragraph = _paragraph(block)
        if paragraph is None or paragraph in seen:
            continue
        seen.add(paragraph)
        if held and len(held) + 1 + len(paragraph) > MAX_CHARS:
            if len(held) >= MIN_CHARS:
                yield held
            held = ""
        held = f"{held}\n{paragraph}" if held else paragraph
    if MIN_CHARS <= len(held) <= MAX_CHARS:
        yield held


def _paragraph(block: str) -> str | None:
    """The block as one line of prose, or None if it is code, a table, a list of names or too short."""
    lines = block.splitlines()
    if ">>>" in block or any(line.lstrip().startswith(("|", "+--", "===", "---", "$ ")) for line in lines):
        return None
    text = _BULLET.sub("", " ".join(" ".join(lines).split()).translate(_PLAIN))
    paragraph = _MARKUP.sub("", _ROLE.sub(r"\1", text))
    words = paragraph.split()
    if len(words) < 6 or len(paragraph) > MAX_CHARS or not _PROSE.match(paragraph):
        return None
    if len(_ODD.findall(paragraph)) > 0.04 * len(paragraph) or max(map(len, words)) > 30:
        return None
    return paragraph
