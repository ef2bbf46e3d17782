"""The chat format of Llama 3 (section 4.1.1 of "The Llama 3 Herd of Models", arXiv 2407.21783; the layout is
that of the released code).

`<|begin_of_text|>` once; then each message is `<|start_header_id|>role<|end_header_id|>`, two line breaks,
the content without the white space around it, `<|eot_id|>`. What a tool returned stands as it is.

An assistant message may end with a call of a tool:

- `brave_search` and `wolfram_alpha`, which the model knows: `<|python_tag|>brave_search.call(query="...")`;
- `code_interpreter`: `<|python_tag|>` and its argument `code`;
- any other tool: `{"name": ..., "parameters": {...}}`, after `<|python_tag|>` if the message ends with `<|eom_id|>`.

By default a message ends with `<|eom_id|>` (a tool's result comes next, in the same turn) after a call of the first
two kinds, and else with `<|eot_id|>`; its `end` says otherwise. See `herdkit.text.tools` for the system prompt that
offers tools and for reading calls back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..data.dialogs import ROLES, Message, Part
from .tokenizer import Tokenizer
from .tools import call_text, is_known

Expand = Callable[[Part], list[int]]


@dataclass
class EncodedDialog:
    """A dialog as tokens.

    Args:
        tokens: ids.
        targets: for each token, whether it is one that the model learns to produce: the content of assistant
            messages, tool calls with their `<|python_tag|>` included, and the token that closes them.
        placements: for each part that is not text: index of its first placeholder in `tokens`, how many
            placeholders it has, and the part.
    """

    tokens: list[int] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)
    placements: list[tuple[int, int, Part]] = field(default_factory=list)

    def _add(self, ids: Sequence[int], *, target: bool) -> None:
        self.tokens += ids
        self.targets += [target] * len(ids)


def encode_dialog(
    messages: Sequence[Message], tokenizer: Tokenizer, expand: Expand | None = None, *, preamble: str = ""
) -> EncodedDialog:
    """Tokens and loss targets of a whole dialog, for training.

    Args:
        expand: gives the placeholder ids of a part that is not text.
        preamble: what the system message begins with, see `herdkit.text.tools.system_preamble`; a dialog without
            a system message gets one of it alone.

    Raises:
        ValueError: an unknown role, media in an assistant message, media without `expand`, a part that
            expands to nothing, a tool call or an end in a message that is not the assistant's, a known tool called
            with other arguments than its own.
    """
    encoded = EncodedDialog()
    encoded._add([tokenizer.bos_id], target=False)
    if preamble and (not messages or messages[0].role != "system"):
        messages = [Message("system", []), *messages]
    for number, message in enumerate(messages):
        where = f"message {number}"
        if message.role not in ROLES:
            raise ValueError(f"{where}: role {message.role!r} is none of {', '.join(ROLES)}")
        target = message.role == "assistant"
        if not target and (message.tool_call is not None or message.end is not None):
            raise ValueError(f"{where}: only the assistant calls tools and says how its message ends")
        encoded._add(_header(message.role, tokenizer), target=False)
        parts = _joined(message.parts) if message.role == "ipython" else _content(message.parts)
        if preamble and number == 0:
            parts = _joined([Part("text", text=preamble), *parts])
        for part in parts:
            if part.type == "text":
                encoded._add(tokenizer.encode(part.text or ""), target=target)
                continue
            if target:
                raise ValueError(f"{where}: an assistant message cannot hold {part.type}")
            ids = expand(part) if expand is not None else []
            if not ids:
                raise ValueError(f"{where}: nothing is attached that takes {part.type}")
            encoded.placements.append((len(encoded.tokens), len(ids), part))
            encoded._add(ids, target=False)
        encoded._add(_end(message, tokenizer, where), target=target)
    return encoded


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, expand: Expand | None = None, *, preamble: str = ""
) -> EncodedDialog:
    """`encode_dialog` followed by an open assistant header: the model's answer comes next and ends with one
    of `tokenizer.stop_ids`. No token is a target."""
    encoded = encode_dialog(messages, tokenizer, expand, preamble=preamble)
    encoded._add(_header("assistant", tokenizer), target=False)
    encoded.targets = [False] * len(encoded.tokens)
    return encoded


def _end(message: Message, tokenizer: Tokenizer, where: str) -> list[int]:
    """The tool call of a message, if it has one, and the token that closes it."""
    call = message.tool_call
    if call is None:
        return [tokenizer.eom_id if message.end == "eom" else tokenizer.eot_id]
    end = message.end or ("eom" if is_known(call) else "eot")
    try:
        body = tokenizer.encode(call_text(call))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    tag = [tokenizer.python_tag_id] if is_known(call) or end == "eom" else []
    return [*tag, *body, tokenizer.eom_id if end == "eom" else tokenizer.eot_id]


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    name, gap = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [tokenizer.start_header_id, *name, tokenizer.end_header_id, *gap]


def _content(parts: Sequence[Part]) -> list[Part]:
    """The parts without white space at either end of the message."""
    joined = _joined(parts)
    if joined and joined[0].type == "text":
        joined[0] = Part("text", text=(joined[0].text or "").lstrip())
    if joined and joined[-1].type == "text":
        joined[-1] = Part("text", text=(joined[-1].text or "").rstrip())
    return joined


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts are joined, so that the tokens do not depend on how the text was cut into parts."""
    joined: list[Part] = []
    for part in parts:
        if part.type == "text" and joined and joined[-1].type == "text":
            joined[-1] = Part("text", text=(joined[-1].text or "") + (part.text or ""))
        else:
            joined.append(part)
    return joined
