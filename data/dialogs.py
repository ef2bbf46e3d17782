"""The schema of a dialog: messages whose content is text, or typed parts of text and media.

    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A red square."}]}

A media part holds its medium under the name of its own type. In a stored sample that is the extension of
another member of the same sample ("png"); in a chat it is whatever the media decoders accept (a path, bytes).

Roles are those of Llama 3 (section 4.1.1 of the paper): `ipython`, or `tool`, marks what a tool returned. A call of
a tool is part of an assistant message, in the form that is customary elsewhere; such a message needs no content:

    {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}

`"end": "eom"` in an assistant message says that a tool's result or another message of the same turn comes next,
`"end": "eot"` that the turn is over; by default see `herdkit.text.dialog`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .shards import Sample

ROLES = ("system", "user", "assistant", "ipython")
ENDS = ("eom", "eot")
MEDIA_TYPES = ("image", "video", "audio")


class DialogError(ValueError):
    """A dialog that breaks the schema; the message names the sample, the message index and the field."""

    member = "json"
    """The member of a stored sample that holds it."""


@dataclass
class Part:
    """A piece of a message: `type` is "text", and `text` holds it, or a media type, and `media` holds it."""

    type: str
    text: str | None = None
    media: Any = None


@dataclass
class ToolCall:
    """What a tool is called for: its name, and its arguments by name, as JSON has them."""

    name: str
    arguments: dict[str, Any]


@dataclass
class Message:
    """One message of a dialog: who speaks, and the parts in the order in which they stand in the text.

    Args:
        tool_call: that ends an assistant message.
        end: how an assistant message ends, "eom" or "eot"; None for the default of the chat format.
    """

    role: str
    parts: list[Part]
    tool_call: ToolCall | None = None
    end: Literal["eom", "eot"] | None = None

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
        raise DialogError(str(error)) from error
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


_OPTIONAL = {"assistant": ("tool_calls", "end"), "ipython": ("tool_call_id", "name")}
"""Fields beside role and content. The two of a tool's result are customary, and not part of Llama's format: the
result belongs to the call before it."""


def _message(item: Any, where: str, media_types: Collection[str]) -> Message:
    if isinstance(item, Message):
        known = item
        item = {"role": known.role, "content": known.parts}
        if known.tool_call is not None:
            item["tool_calls"] = [known.tool_call]
        if known.end is not None:
            item["end"] = known.end
    if not isinstance(item, dict):
        raise DialogError(f"{where} must be an object with role and content, not {_kind(item)}")
    calls = item.get("tool_calls")
    if calls and item.get("content") in (None, []):
        item = {**item, "content": ""}
    role = "ipython" if item.get("role") == "tool" else item.get("role")
    optional = _OPTIONAL.get(role, ()) if isinstance(role, str) else ()
    _check_fields(item, ("role", "content"), where, optional)
    if not isinstance(role, str) or role not in ROLES:
        raise DialogError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}")
    message = Message(role, _parts(item["content"], f"{where}.content", media_types))
    if calls not in (None, []):
        message.tool_call = _tool_call(calls, f"{where}.tool_calls")
    if (end := item.get("end")) is not None:
        if end not in ENDS:
            raise DialogError(f"{where}.end must be one of {', '.join(ENDS)}, not {end!r}")
        message.end = end
    return message


def _parts(content: Any, where: str, media_types: Collection[str]) -> list[Part]:
    if isinstance(content, str):
        return [Part("text", text=content)]
    if not isinstance(content, list):
        raise DialogError(f"{where} must be a string or a list of parts, not {_kind(content)}")
    if not content:
        raise DialogError(f"{where} is empty; write an empty string for a message without text")
    return [_part(item, f"{where}[{n}]", media_types) for n, item in enumerate(content)]


def _tool_call(calls: Any, where: str) -> ToolCall:
    if not isinstance(calls, list) or len(calls) != 1:
        raise DialogError(f"{where} must be a list of one call: Llama's format has one in a message")
    call, where = calls[0], f"{where}[0]"
    if isinstance(call, ToolCall):
        call = {"function": {"name": call.name, "arguments": call.arguments}}
    if not isinstance(call, dict):
        raise DialogError(f"{where} must be an object with a function, not {_kind(call)}")
    _check_fields(call, ("function",), where, ("type", "id"))
    function, where = call["function"], f"{where}.function"
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise DialogError(f"{where} must be an object, and its type 'function'")
    _check_fields(function, ("name", "arguments"), where)
    name, arguments = function["name"], function["arguments"]
    if not isinstance(name, str) or not name:
        raise DialogError(f"{where}.name must be the name of a tool, not {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DialogError(f"{where}.arguments is a string, but not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise DialogError(f"{where}.arguments must be an object, not {_kind(arguments)}")
    return ToolCall(name, arguments)


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


def _check_fields(item: dict[str, Any], fields: Sequence[str], where: str, optional: Sequence[str] = ()) -> None:
    for field in fields:
        if field not in item:
            raise DialogError(f"{where}.{field} is missing; the fields there are {_listed(item)}")
    # A field that nobody reads would be training data that is silently not trained on.
    for field in item:
        if field not in fields and field not in optional:
            names = ", ".join((*fields, *optional))
            raise DialogError(f"{where} has an unknown field {field!r}; its fields are {names}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, names)) if names else "none"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
