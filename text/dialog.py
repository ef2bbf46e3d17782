"""The chat format of Llama 3 (section 4.1.1 of "The Llama 3 Herd of Models", arXiv 2407.21783; the layout is
that of the released code).

`<|begin_of_text|>` once; then each message is `<|start_header_id|>role<|end_header_id|>`, two line breaks,
the content without the white space around it, `<|eot_id|>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..data.dialogs import ROLES, Message, Part
from .tokenizer import Tokenizer

Expand = Callable[[Part], list[int]]


@dataclass
class EncodedDialog:
    """A dialog as tokens.

    Args:
        tokens: ids.
        targets: for each token, whether it is one that the model learns to produce: the content of assistant
            messages and the token that closes them.
        placements: for each part that is not text: index of its first placeholder in `tokens`, how many
            placeholders it has, and the part.
    """

    tokens: list[int] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)
    placements: list[tuple[int, int, Part]] = field(default_factory=list)

    def _add(self, ids: Sequence[int], *, target: bool) -> None:
        self.tokens += ids
        self.targets += [target] * len(ids)


def encode_dialog(messages: Sequence[Message], tokenizer: Tokenizer, expand: Expand | None = None) -> EncodedDialog:
    """Tokens and loss targets of a whole dialog, for training.

    Args:
        expand: gives the placeholder ids of a part that is not text.

    Raises:
        ValueError: an unknown role, media in an assistant message, media without `expand`, a part that
            expands to nothing.
    """
    encoded = EncodedDialog()
    encoded._add([tokenizer.bos_id], target=False)
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise ValueError(f"message {number}: role {message.role!r} is none of {', '.join(ROLES)}")
        target = message.role == "assistant"
        encoded._add(_header(message.role, tokenizer), target=False)
        for part in _content(message.parts):
            if part.type == "text":
                encoded._add(tokenizer.encode(part.text or ""), target=target)
                continue
            if target:
                raise ValueError(f"message {number}: an assistant message cannot hold {part.type}")
            ids = expand(part) if expand is not None else []
            if not ids:
                raise ValueError(f"message {number}: nothing is attached that takes {part.type}")
            encoded.placements.append((len(encoded.tokens), len(ids), part))
            encoded._add(ids, target=False)
        encoded._add([tokenizer.eot_id], target=target)
    return encoded


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, expand: Expand | None = None) -> EncodedDialog:
    """`encode_dialog` followed by an open assistant header: the model's answer comes next and ends with one
    of `tokenizer.stop_ids`. No token is a target."""
    encoded = encode_dialog(messages, tokenizer, expand)
    encoded._add(_header("assistant", tokenizer), target=False)
    encoded.targets = [False] * len(encoded.tokens)
    return encoded


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    name, gap = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [tokenizer.start_header_id, *name, tokenizer.end_header_id, *gap]


def _content(parts: Sequence[Part]) -> list[Part]:
    """The parts without white space at either end of the message. Neighbouring texts are joined, so that the
    tokens do not depend on how the text was cut into parts."""
    joined: list[Part] = []
    for part in parts:
        if part.type == "text" and joined and joined[-1].type == "text":
            joined[-1] = Part("text", text=(joined[-1].text or "") + (part.text or ""))
        else:
            joined.append(part)
    if joined and joined[0].type == "text":
        joined[0] = Part("text", text=(joined[0].text or "").lstrip())
    if joined and joined[-1].type == "text":
        joined[-1] = Part("text", text=(joined[-1].text or "").rstrip())
    return joined
