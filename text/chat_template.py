"""The chat format as a Jinja template for other libraries: what transformers and vLLM make of a dialog is what
`herdkit.text.encode_dialog` makes of it.

Its arguments, beside messages and add_generation_prompt: `builtin_tools`, `tools` and `date_string`, which are `tools`,
`functions` and `today` of `herdkit.text.tools.system_preamble`. Where any of them is given, the system message begins
with that preamble, as in the released template of Llama 3.1; without them only the messages are written, as in
that of Llama 3, so that a model that was tuned without the preamble is also asked without it.

What differs from the released 3.1 template: it writes the preamble always; offers `tools` in the first user message,
or in other words; puts a tool's result that is a string in quotes; and calls of `tools` end with `<|eom_id|>`
where `builtin_tools` are given, while here the message's `end` decides.
"""

from __future__ import annotations

from collections.abc import Mapping

from .tools import BUILT_IN, INTERPRETER, OFFER

_TEMPLATE = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{ content }}
    {%- elif content is mapping -%}
        {{ content | tojson }}
    {%- else -%}
        {%- for part in content or [] -%}
            {%- if part.type == 'text' -%}
                {{ part.text }}
            {%- elif part.type in PLACEHOLDERS -%}
                {{ PLACEHOLDERS[part.type] }}
            {%- else -%}
                {{ raise_exception('this chat template does not write ' + part.type) }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro text_of_call(call) -%}
    {%- if call.name == INTERPRETER -%}
        {{ call.arguments.code }}
    {%- elif call.name in BUILT_IN -%}
        {{ call.name + '.call(query="' + call.arguments.query + '")' }}
    {%- else -%}
        {{ '{"name": ' + (call.name | tojson) + ', "parameters": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}' }}
    {%- endif -%}
{%- endmacro -%}

{%- set known = builtin_tools | default([], true) -%}
{%- set functions = tools | default([], true) -%}
{%- set preamble -%}
    {%- if known or functions or date_string is defined -%}
        {%- if known or functions -%}
            {{ 'Environment: ipython\n' }}
        {%- endif -%}
        {%- set named = known | reject('equalto', INTERPRETER) | list -%}
        {%- if named -%}
            {{ 'Tools: ' + named | join(', ') + '\n\n' }}
        {%- endif -%}
        {{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + (date_string | default('26 Jul 2024')) + '\n\n' }}
        {%- if functions -%}
            {{ OFFER + '\n\n' }}
            {%- for function in functions -%}
                {{ (function | tojson(indent=4)) + '\n\n' }}
            {%- endfor -%}
        {%- endif -%}
    {%- endif -%}
{%- endset -%}

{{ bos_token }}
{%- if preamble and not (messages and messages[0].role == 'system') -%}
    {{ '<|start_header_id|>system<|end_header_id|>\n\n' + preamble + '<|eot_id|>' }}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'ipython' if message.role == 'tool' else message.role -%}
    {{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {%- if loop.first and role == 'system' -%}
        {{ preamble }}
    {%- endif -%}
    {{ text_of(message.content) if role == 'ipython' else text_of(message.content) | trim }}
    {%- set end = message.end or 'eot' -%}
    {%- if message.tool_calls -%}
        {%- if message.tool_calls | length > 1 -%}
            {{ raise_exception('a message of Llama 3 calls one tool') }}
        {%- endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {%- set built_in = call.name == INTERPRETER or call.name in BUILT_IN -%}
        {%- set end = message.end or ('eom' if built_in else 'eot') -%}
        {{ ('<|python_tag|>' if built_in or end == 'eom' else '') + text_of_call(call) + '<|' + end + '_id|>' }}
    {%- else -%}
        {{ '<|' + end + '_id|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""


def chat_template(placeholders: Mapping[str, str]) -> str:
    """The template of a model that takes media.

    Args:
        placeholders: what stands in the text for a part of a message, by its type: {"image": "<|image|>"}.
    """
    return (
        f"{{%- set BUILT_IN = {list(BUILT_IN)!r} -%}}\n{{%- set INTERPRETER = {INTERPRETER!r} -%}}\n"
        f"{{%- set OFFER = {OFFER!r} -%}}\n{{%- set PLACEHOLDERS = {dict(placeholders)!r} -%}}" + _TEMPLATE.rstrip("\n")
    )


CHAT_TEMPLATE = chat_template({})
"""That of a language model alone."""
