"""Tools in the chat format of Llama 3 (section 4.1.1 of "The Llama 3 Herd of Models", arXiv 2407.21783): the system
prompt that offers them, the text of a call, and calls read back from generated tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.dialogs import Message, Part, ToolCall
from .tokenizer import Tokenizer

BUILT_IN = ("brave_search", "wolfram_alpha")
INTERPRETER = "code_interpreter"

_ARGUMENT = dict.fromkeys(BUILT_IN, "query") | {INTERPRETER: "code"}
_BUILT_IN_CALL = re.compile(rf'({"|".join(BUILT_IN)})\.call\(query="(.*)"\)', re.DOTALL)
_TAGGED_CALL = re.compile(r"<function=([^<>]+)>(.*)</function>", re.DOTALL)

OFFER = (
    "These functions are at your service. To call one, answer with nothing but a JSON object of the form "
    '{"name": name of the function, "parameters": object of its arguments by name}, with values in place of variables.'
)


def system_preamble(
    *,
    tools: Sequence[str] = (),
    functions: Sequence[Mapping[str, Any]] = (),
    knowledge: str = "December 2023",
    today: str = "26 Jul 2024",
) -> str:
    """What the system message of the released models begins with.

    Args:
        tools: those that the model knows: "brave_search", "wolfram_alpha", "code_interpreter".
        functions: other tools, each a JSON schema in the customary form: {"type": "function", "function": {...}}.
            The sentence that offers them is ours; the released template has another.
        knowledge, today: dates, in these words.

    Raises:
        ValueError: a tool that the model does not know.
    """
    if unknown := set(tools) - set(_ARGUMENT):
        raise ValueError(
            f"no built-in tools {sorted(unknown)}; there are {', '.join(_ARGUMENT)}; give others as functions"
        )
    lines = ["Environment: ipython\n"] if tools or functions else []
    if named := [tool for tool in tools if tool != INTERPRETER]:
        lines.append(f"Tools: {', '.join(named)}\n\n")
    lines.append(f"Cutting Knowledge Date: {knowledge}\nToday Date: {today}\n\n")
    if functions:
        lines.append(OFFER + "\n\n")
        lines += [json.dumps(function, indent=4, ensure_ascii=False) + "\n\n" for function in functions]
    return "".join(lines)


def is_known(call: ToolCall) -> bool:
    """Whether the model knows the tool without being told of it."""
    return call.name in _ARGUMENT


def call_text(call: ToolCall) -> str:
    """The text of a call, without the tokens around it.

    Raises:
        ValueError: a known tool with other arguments than its own one, a string.
    """
    if not is_known(call):
        return json.dumps({"name": call.name, "parameters": call.arguments}, ensure_ascii=False)
    key = _ARGUMENT[call.name]
    if list(call.arguments) != [key] or not isinstance(call.arguments[key], str):
        raise ValueError(f"{call.name} takes one argument, {key!r}, a string; not {call.arguments}")
    return call.arguments[key] if call.name == INTERPRETER else f'{call.name}.call(query="{call.arguments[key]}")'


@dataclass
class Reply:
    """What the model answered.

    Args:
        message: of the assistant, with text, a tool call, or both.
        end: "eot", the turn is over; "eom", a tool's result is expected; "end_of_text"; None, cut off before any.
    """

    message: Message
    end: Literal["eot", "eom", "end_of_text"] | None


def parse_reply(tokens: Sequence[int], tokenizer: Tokenizer) -> Reply:
    """Reads generated tokens, from behind the assistant's open header to the first stop token, or to the end.

    After `<|python_tag|>` stands the call of a built-in tool, a JSON object with name and parameters, or else code
    for the interpreter. Without the tag, a text that is all JSON object of that kind is a call, and so is the form
    `<function=name>{...}</function>`; any other is text.
    """
    ends = {tokenizer.eot_id: "eot", tokenizer.eom_id: "eom", tokenizer.eos_id: "end_of_text"}
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    end: Any = ends[tokens[stop]] if stop < len(tokens) else None
    body = list(tokens[:stop])
    tag = body.index(tokenizer.python_tag_id) if tokenizer.python_tag_id in body else len(body)
    text = tokenizer.decode(body[:tag]).strip()
    if tag < len(body):
        call = _tool_call(code := tokenizer.decode(body[tag + 1 :])) or ToolCall(INTERPRETER, {"code": code})
    elif call := _custom_call(text):
        text = ""
    message = Message("assistant", [Part("text", text=text)], call, None if end == "end_of_text" else end)
    return Reply(message, end)


def _tool_call(body: str) -> ToolCall | None:
    """What stands after `<|python_tag|>`, if it is no code."""
    if found := _BUILT_IN_CALL.fullmatch(body.strip()):
        return ToolCall(found[1], {"query": found[2]})
    return _custom_call(body)


def _custom_call(text: str) -> ToolCall | None:
    if found := _TAGGED_CALL.fullmatch(text.strip()):
        name, arguments = found[1], _json(found[2])
    else:
        content = _json(text)
        content = content if isinstance(content, dict) else {}
        name, arguments = content.get("name"), content.get("parameters")
    return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None  # it is text or code then
