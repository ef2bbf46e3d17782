"""Dialogs as a page: every token as the model sees it, those that count in the loss marked. One file without scripts
or links to anywhere."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from ..data.contact_sheet import SAMPLE_RATE, film_strip, fitted, spectrogram
from ..data.dialogs import ROLES, Part
from ..data.media import load_audio, load_image
from ..data.shards import Sample
from ..text.tokenizer import Tokenizer
from .sample_tokens import SampleEncoder, SampleTokens, has_dialog, reason_in

STYLE = """
body { font: 15px/1.7 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; overflow-wrap: anywhere }
h2 small { font-weight: normal; color: #667085; margin-left: .6rem }
.message { border-left: 4px solid #d0d5dd; margin: .5rem 0; padding: .15rem .8rem }
.message.user { border-color: #7ba3e0 } .message.assistant { border-color: #4fae72 }
.message.ipython { border-color: #c79a3b }
.t { white-space: pre-wrap; overflow-wrap: anywhere; box-shadow: inset -1px 0 #dfe3ea }
.loss { background: #c8efd4; box-shadow: inset -1px 0 #8fcfa6, inset 0 -2px #2e8b57 }
.special { font: 11px/1.4 ui-monospace, monospace; color: #667085; border: 1px solid #d0d5dd; border-radius: 3px;
  padding: 0 .25rem; margin: 0 .1rem; white-space: nowrap }
.special.loss { color: #12733d; border-color: #2e8b57; box-shadow: none }
.t i { color: #98a2b3; font-style: normal }
figure { margin: .4rem 0; display: block } figure img { max-width: 100%; max-height: 14rem; display: block }
figcaption { font-size: .8rem; color: #667085 } .wrong { color: #b3261e }
"""


def dialog_page(samples: Iterable[Sample], encode: SampleEncoder) -> str | None:
    """The dialogs among these samples as HTML, or None where there are none. A dialog that cannot be encoded stands
    there with the reason.

    Each run of bytes that is whole characters is a span with the ids of its tokens in `data-ids` and the class `loss`
    where they count in the loss, as in the labels of `herdkit.adapters.DialogCollator`.
    """
    sections = []
    for sample in samples:
        try:
            if not has_dialog(sample):
                continue
            tokens = encode(sample)
            assert tokens is not None
            sections.append(_section(sample, tokens, encode.tokenizer))
        except ValueError as error:
            reason = html.escape(reason_in(error, sample))
            sections.append(f"<h2>{html.escape(sample.key)}</h2><p class=wrong>{reason}</p>")
    if not sections:
        return None
    legend = (
        '<p>Every token that the model sees; <span class="t loss">these</span> count in the loss. '
        '<span class="special">&lt;|such|&gt;</span> are special tokens, <span class=t><i>⏎</i></span> is a line break.'
    )
    if encode.stand_ins:
        legend += f" No adapter for {', '.join(encode.stand_ins)} was given, so each of those counts as one token."
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Dialogs</title><style>{STYLE}</style><body>'
        f"<h1>Dialogs in tokens</h1>{legend}</p>{''.join(sections)}</body></html>\n"
    )


def _section(sample: Sample, found: SampleTokens, tokenizer: Tokenizer) -> str:
    counts = f"{len(found.tokens):,} tokens, {sum(found.targets):,} in the loss"
    body = "".join(
        f'<div class="message {role}">{"".join(_spans(found, start, stop, tokenizer))}</div>'
        for role, start, stop in _messages(found.tokens, tokenizer)
    )
    return f"<h2>{html.escape(sample.key)}<small>{counts}</small></h2>{body}"


def _messages(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[str, int, int]]:
    """The role, the first token and that after the last one of each message; begin of text belongs to the first."""
    starts = [i for i, token in enumerate(tokens) if token == tokenizer.start_header_id]
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(tokens)
        role = tokenizer.decode(tokens[start + 1 : list(tokens).index(tokenizer.end_header_id, start)])
        yield role if role in ROLES else "", 0 if number == 0 else start, stop


def _spans(found: SampleTokens, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[str]:
    media = {first: (length, part) for first, length, part in found.media}
    at = start
    while at < stop:
        if at in media:
            length, part = media[at]
            name = html.escape(tokenizer.decode([found.tokens[at]], keep_special=True))
            caption = f'<span class="special">{name}</span>{f" x {length:,}" * (length > 1)}'
            yield f"<figure>{picture_of(part)}<figcaption>{caption}</figcaption></figure>"
            at += length
            continue
        end = at + 1
        if not tokenizer.token_bytes(found.tokens[at]):
            name = html.escape(tokenizer.decode([found.tokens[at]], keep_special=True))
            yield _span("special", name, found, at, end)
        else:
            while not _whole(found.tokens[at:end], tokenizer) and _goes_on(found, at, end, stop, tokenizer):
                end += 1
            content = b"".join(map(tokenizer.token_bytes, found.tokens[at:end]))
            text = html.escape(content.decode("utf-8", "backslashreplace"))
            yield _span("t", re.sub("\n+", lambda run: f"<i>{'⏎' * len(run[0])}</i>\n", text), found, at, end)
        at = end


def _span(kind: str, text: str, found: SampleTokens, start: int, end: int) -> str:
    ids = " ".join(map(str, found.tokens[start:end]))
    counts = " loss" if found.targets[start] else ""
    return f'<span class="{kind}{counts}" data-ids="{ids}" title="{ids}">{text}</span>'


def _whole(tokens: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether tokens end where a character ends."""
    try:
        b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _goes_on(found: SampleTokens, start: int, end: int, stop: int, tokenizer: Tokenizer) -> bool:
    """Whether the next token may hold the rest of a character: it has bytes and counts as the others do."""
    if end >= stop or end - start >= 4 or found.targets[end] != found.targets[start]:
        return False
    return bool(tokenizer.token_bytes(found.tokens[end]))


def picture_of(part: Part) -> str:
    """What a medium looks like; the reason where it cannot be decoded, which a model without its adapter never does."""
    try:
        if part.type == "image":
            picture = fitted(load_image(part.media), (320, 224))
        elif part.type == "video":
            picture = film_strip(part.media, 112)
        elif part.type == "audio":
            sound = load_audio(part.media, SAMPLE_RATE)
            picture = spectrogram(sound, max(24.0, min(240.0, 800 * SAMPLE_RATE / len(sound))), 96, 900)
        else:
            return f"<div>({html.escape(part.type)})</div>"
    except ValueError as error:
        return f"<div class=wrong>{html.escape(str(error))}</div>"
    return f'<img alt="{part.type}" src="data:image/png;base64,{_png(picture)}">'


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
