"""The schema of a dialog: messages whose content is text, or typed parts of text and media.

    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A red square."}]}

A media part holds its medium under the name of its own type. In a stored sample that is the extension of
another member of the same sample ("png"); in a chat it is whatever the media decoders accept (a path, bytes).
Roles are those of Llama 3 (section 4.1.1 of the paper): `ipython` marks what a tool returned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .shards import Sample

ROLES = ("system", "user", "assistant", "ipython")
MEDIA_TYPES = ("image", "video", "audio")


class DialogError(ValueError):
    """A dialog that breaks the schema; the message names the sample, the message index and the field."""


@dataclass
class Part:
    """A piece of a message: `type` is "text", and `text` holds it, or a media type, and `media` holds it."""

    type: str
    text: str | None = None
    media: Any = None


@dataclass
class Message:
    """One turn of a dialog: who speaks, and the parts in the order in which they stand in the text."""

    role: str
    parts: list[Part]

    @property
    def text(self) -> str:
        """The text parts joined without a separator; media parts leave no trace."""
        return "".join(part.text or "" for part in self.parts if part.type == "text")

    @property
    def media(self) -> list[Part]:
        """The parts that are not text, in order."""
        return [part for part in self.parts if part.type != "text"]


def parse_dialog(
    messages: Sequence[dict[str, Any] | Message], where: str, media_types: Collection[str] = MEDIA_TYPES
) -> list[Message]:
    """Checks a list of messages and gives it as `Message` objects; `Message` objects in it are checked too.

    Args:
        messages: `{"role": ..., "content": str | [part, ...]}` each, at least one.
        where: names the dialog in errors, for instance "shard.tar: sample 000017".
        media_types: the part types beside "text" that may occur; a third party's adapter adds its own.

    Raises:
        DialogError: an empty list, an unknown role or part type, a missing, surplus or ill-typed field.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise DialogError(f"{where}: messages must be a list, not {_kind(messages)}")
    if not messages:
        raise DialogError(f"{where}: messages is empty; a dialog has at least one message")
    return [_message(item, f"{where}: messages[{i}]", media_types) for i, item in enumerate(messages)]


def dialog_sample(sample: Sample, media_types: Collection[str] = MEDIA_TYPES) -> list[Message]:
    """The dialog of a stored sample, each media part holding the bytes of the member that it names.

    Raises:
        DialogError: the sample has no `json` member, or its JSON breaks the schema, or a part names a member
            that is not there.
    """
    where = f"{sample.shard}: sample {sample.key}"
    if "json" not in sample.members:
        raise DialogError(f"{where}: no member 'json'; its members are {_listed(sample.members)}")
    try:
        content = sample.json()
    except ValueError as error:
        raise DialogError(f"{where}: member 'json' is not JSON: {error}") from error
    if not isinstance(content, dict) or "messages" not in content:
        found = f"the fields {_listed(content)}" if isinstance(content, dict) else _kind(content)
        raise DialogError(f"{where}: member 'json' must be an object with 'messages', but holds {found}")
    dialog = parse_dialog(content["messages"], where, media_types)
    for index, message in enumerate(dialog):
        for number, part in enumerate(message.parts):
            if part.type == "text":
                continue
            field = f"{where}: messages[{index}].content[{number}].{part.type}"
            if not isinstance(part.media, str):
                raise DialogError(f"{field} must be a member's extension, not {_kind(part.media)}")
            if part.media not in sample.members:
                raise DialogError(f"{field}: no member {part.media!r}; there are {_listed(sample.members)}")
            part.media = sample.members[part.media]
    return dialog


def _message(item: Any, where: str, media_types: Collection[str]) -> Message:
    if isinstance(item, Message):
        item = {"role": item.role, "content": item.parts}
    if not isinstance(item, dict):
        raise DialogError(f"{where} must be an object with role and content, not {_kind(item)}")
    _check_fields(item, ("role", "content"), where)
    role, content = item["role"], item["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise DialogError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}")
    if isinstance(content, str):
        return Message(role, [Part("text", text=content)])
    if not isinstance(content, list):
        raise DialogError(f"{where}.content must be a string or a list of parts, not {_kind(content)}")
    if not content:
        raise DialogError(f"{where}.content is empty; write an empty string for a message without text")
    return Message(role, [_part(item, f"{where}.content[{n}]", media_types) for n, item in enumerate(content)])


def _part(item: Any, where: str, media_types: Collection[str]) -> Part:
    if isinstance(item, Part):
        item = {"type": item.type, item.type: item.text if item.type == "text" else item.media}
    if not isinstance(item, dict):
        raise DialogError(f"{where} must be an object with a type, not {_kind(item)}")
    if "type" not in item:
        raise DialogError(f"{where}.type is missing; the fields there are {_listed(item)}")
    kind = item["type"]
    if not isinstance(kind, str) or (kind != "text" and kind not in media_types):
        raise DialogError(f"{where}.type must be one of {', '.join(['text', *media_types])}, not {kind!r}")
    _check_fields(item, ("type", kind), where)
    value = item[kind]
    if kind == "text":
        if not isinstance(value, str):
            raise DialogError(f"{where}.text must be a string, not {_kind(value)}")
        return Part("text", text=value)
    if value is None or (isinstance(value, str | bytes) and not value):
        raise DialogError(f"{where}.{kind} is empty; it must name or hold the {kind}")
    return Part(kind, media=value)


def _check_fields(item: dict[str, Any], fields: tuple[str, str], where: str) -> None:
    for field in fields:
        if field not in item:
            raise DialogError(f"{where}.{field} is missing; the fields there are {_listed(item)}")
    # A field that nobody reads would be training data that is silently not trained on.
    for field in item:
        if field not in fields:
            raise DialogError(f"{where} has an unknown field {field!r}; its fields are {', '.join(fields)}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, names)) if names else "none"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
