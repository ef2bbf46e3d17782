"""Made web pages as a browser draws them, one element framed, and its HTML (section 7.1.1: screenshot parsing, as in
Pix2Struct, arXiv 2210.03347)."""

from __future__ import annotations

import html
import shutil
import subprocess
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from .figures import NOUNS, PLACES, STEPS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
)
_FRAME = "outline:3px solid #e6007e;outline-offset:2px"


class BrowserError(RuntimeError):
    """There is no browser, or it drew nothing."""


def page(rng: Random) -> tuple[str, str]:
    """A page of a heading, a paragraph, a list, a table, a form or some of them, and the HTML of the one that it
    frames; in that, the frame is left out."""
    makers = [_heading, _words, _list, _table, _form]
    parts = [make(rng) for make in rng.sample(makers, rng.randint(2, len(makers)))]
    chosen = rng.randrange(len(parts))
    body = "".join(part if i != chosen else part.replace(">", f' style="{_FRAME}">', 1) for i, part in enumerate(parts))
    ink, paper = rng.choice((("#222", "#fff"), ("#123", "#eef4fb"), ("#eee", "#22252b")))
    font = rng.choice(("sans-serif", "serif", "monospace"))
    style = f"body{{font:{rng.choice((14, 16, 18))}px {font};color:{ink};background:{paper};margin:20px}}"
    style += "table{border-collapse:collapse}td,th{border:1px solid #888;padding:2px 8px}"
    return f"<!doctype html><meta charset=utf-8><style>{style}</style><body>{body}</body>", parts[chosen]


def _heading(rng: Random) -> str:
    level = rng.randint(1, 3)
    return f"<h{level}>{rng.choice(PLACES)} {rng.choice(NOUNS)}</h{level}>"


def _words(rng: Random) -> str:
    words = rng.sample((*NOUNS, *PLACES, *STEPS), rng.randint(5, 14))
    words[rng.randrange(len(words))] = f"<b>{html.escape(rng.choice(NOUNS))}</b>"
    return f"<p>{' '.join(words)}</p>"


def _list(rng: Random) -> str:
    kind = rng.choice(("ul", "ol"))
    return f"<{kind}>{''.join(f'<li>{step}</li>' for step in rng.sample(STEPS, rng.randint(2, 4)))}</{kind}>"


def _table(rng: Random) -> str:
    head = f"<tr><th>item</th><th>{rng.choice(PLACES)}</th></tr>"
    rows = "".join(f"<tr><td>{n}</td><td>{rng.randint(0, 99)}</td></tr>" for n in rng.sample(NOUNS, rng.randint(1, 3)))
    return f"<table>{head}{rows}</table>"


def _form(rng: Random) -> str:
    name = rng.choice(NOUNS)
    field = f'<label>{name}</label><input name="{name}" value="{rng.randint(1, 9)}">'
    return f"<form>{field}<button>{rng.choice(STEPS)}</button></form>"


def find_browser() -> str | None:
    """A Chromium on this machine, or None."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def screenshot(source: str, width: int = 448, height: int = 448, browser: str | None = None) -> bytes:
    """A page as PNG, drawn by a real browser; a second or two each.

    Raises:
        BrowserError: there is none, or it fails; says what it printed.
    """
    browser = browser or find_browser()
    if browser is None:
        raise BrowserError(f"no browser is installed: none of {', '.join(BROWSERS)} is on the path")
    with tempfile.TemporaryDirectory() as folder:
        place, picture = Path(folder) / "page.html", Path(folder) / "page.png"
        place.write_text(source, encoding="utf-8")
        command = [browser, *_FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        command += [f"--screenshot={picture}", place.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired as error:
            raise BrowserError(f"{browser} took longer than two minutes for a page") from error
        if not picture.is_file():
            raise BrowserError(f"{browser} drew nothing: {' '.join(done.stderr.split())[-300:]}")
        return picture.read_bytes()


def sample(seed: int, index: int, browser: str | None = None) -> dict[str, Any]:
    """The members of one sample: a page with a framed element, and a dialog that asks for its code.

    Raises:
        BrowserError: see `screenshot`.
    """
    source, code = page(Random(f"{seed}/screenshot/{index}"))
    asked = [{"type": "image", "image": "png"}, {"type": "text", "text": "write the html of what is framed"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": code}]
    return {"png": screenshot(source, browser=browser), "json": {"messages": messages, "kind": "screenshot"}}
