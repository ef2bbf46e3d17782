import herdkit
import pytest
from herdkit.adapters import compose
from herdkit.data.dialogs import Message, Part, ToolCall, parse_dialog
from herdkit.text import encode_dialog, encode_prompt, parse_reply, system_preamble

BEGIN = "<|begin_of_text|>"


def said(role, text, end="eot"):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|{end}_id|>"


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


QUESTION = {"role": "user", "content": " What is the weather in Oslo? "}
ASKED = said("user", "What is the weather in Oslo?")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 23 July 2024\n\n"
SEARCH = call("brave_search", query='weather "Oslo" today')
SEARCHED = '<|python_tag|>brave_search.call(query="weather "Oslo" today")'
WEATHER = call("weather", city="Tromsø", days=2, units=None)
JSON_CALL = '{"name": "weather", "parameters": {"city": "Tromsø", "days": 2, "units": null}}'
CODE = "import math\n\nprint(math.pi)\n"
FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LISTED = """{
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object"
        }
    }
}

"""

# Messages, arguments of the template, and the text, written by hand from the released format: section 4.1.1, Meta's
# documents, and the templates of Llama 3 (no arguments) and Llama 3.1 (the others).
TABLE = {
    "plain": ([QUESTION, {"role": "assistant", "content": "Cold.\n"}], {}, ASKED + said("assistant", "Cold.")),
    "dates without a system message": (
        [QUESTION],
        {"date_string": "23 July 2024"},
        said("system", DATES) + ASKED,
    ),
    "dates before a system message": (
        [{"role": "system", "content": " Be brief. "}, QUESTION],
        {"date_string": "23 July 2024"},
        said("system", DATES + "Be brief.") + ASKED,
    ),
    "built-in tool": (
        [
            {"role": "system", "content": "Be brief."},
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [SEARCH]},
            {"role": "tool", "content": '{"output": "4 C"}\n'},
            {"role": "assistant", "content": "It is 4 C."},
        ],
        {"builtin_tools": ["brave_search", "code_interpreter", "wolfram_alpha"], "date_string": "23 July 2024"},
        said("system", "Environment: ipython\nTools: brave_search, wolfram_alpha\n\n" + DATES + "Be brief.")
        + ASKED
        + said("assistant", SEARCHED, "eom")
        + said("ipython", '{"output": "4 C"}\n')
        + said("assistant", "It is 4 C."),
    ),
    "code interpreter": (
        [
            {"role": "user", "content": "pi?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call("code_interpreter", code=CODE)]},
            {"role": "ipython", "content": "3.14"},
            {"role": "assistant", "content": "About 3.14", "end": "eom"},
            {"role": "assistant", "content": "Anything else?"},
        ],
        {"builtin_tools": ["code_interpreter"]},
        said("system", "Environment: ipython\n" + DATES.replace("23 July", "26 Jul"))
        + said("user", "pi?")
        + said("assistant", "Let me see.<|python_tag|>" + CODE, "eom")
        + said("ipython", "3.14")
        + said("assistant", "About 3.14", "eom")
        + said("assistant", "Anything else?"),
    ),
    "own tool": (
        [QUESTION, {"role": "assistant", "tool_calls": [WEATHER]}, {"role": "tool", "content": "4"}],
        {},
        ASKED + said("assistant", JSON_CALL) + said("ipython", "4"),
    ),
    "own tool in the ipython environment": (
        [QUESTION, {"role": "assistant", "tool_calls": [WEATHER], "end": "eom"}],
        {"builtin_tools": ["brave_search"], "date_string": "23 July 2024"},
        said("system", "Environment: ipython\nTools: brave_search\n\n" + DATES)
        + ASKED
        + said("assistant", "<|python_tag|>" + JSON_CALL, "eom"),
    ),
}


@pytest.fixture(scope="module")
def transformers_tokenizer(tokenizer, make_model, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    model = compose(make_model(vocab_size=tokenizer.vocab_size), tokenizer)
    path = herdkit.save(model, tmp_path_factory.mktemp("saved") / "hf", "huggingface")
    return transformers.AutoTokenizer.from_pretrained(path)


def preamble(builtin_tools=(), tools=(), **dates):
    if not (builtin_tools or tools or dates):
        return ""
    return system_preamble(tools=builtin_tools, functions=tools, today=dates.get("date_string", "26 Jul 2024"))


class TestFormat:
    @pytest.mark.parametrize("case", TABLE)
    def test_text(self, tokenizer, case):
        messages, arguments, expected = TABLE[case]
        dialog = parse_dialog(messages, case)
        encoded = encode_dialog(dialog, tokenizer, preamble=preamble(**arguments))
        assert tokenizer.decode(encoded.tokens, keep_special=True) == BEGIN + expected
        assert parse_dialog(dialog, "again") == dialog

    @pytest.mark.parametrize("opened", [False, True])
    @pytest.mark.parametrize("case", TABLE)
    def test_the_saved_template_says_the_same(self, tokenizer, transformers_tokenizer, case, opened):
        messages, arguments, expected = TABLE[case]
        settings = {**arguments, "add_generation_prompt": opened}
        text = transformers_tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        assert text == BEGIN + expected + "<|start_header_id|>assistant<|end_header_id|>\n\n" * opened
        ids = transformers_tokenizer.apply_chat_template(messages, return_dict=False, **settings)
        encode = encode_prompt if opened else encode_dialog
        assert ids == encode(parse_dialog(messages, case), tokenizer, preamble=preamble(**arguments)).tokens

    def test_functions_are_offered(self, tokenizer, transformers_tokenizer):
        text = system_preamble(functions=[FUNCTION], today="23 July 2024")
        assert text.startswith("Environment: ipython\n" + DATES)
        assert text.endswith("\n\n" + LISTED)
        messages = [{"role": "system", "content": "Be brief."}, QUESTION]
        theirs = transformers_tokenizer.apply_chat_template(
            messages, tools=[FUNCTION], date_string="23 July 2024", tokenize=False
        )
        assert theirs == BEGIN + said("system", text + "Be brief.") + ASKED

    def test_the_template_of_parts_and_of_what_it_cannot_write(self, transformers_tokenizer):
        def render(*messages):
            return transformers_tokenizer.apply_chat_template(list(messages), tokenize=False)

        parts = [{"type": "text", "text": " What is"}, {"type": "text", "text": " it? "}]
        assert render({"role": "user", "content": parts}) == BEGIN + said("user", "What is it?")
        assert render({"role": "tool", "content": {"a": [1]}}) == BEGIN + said("ipython", '{"a": [1]}')
        with pytest.raises(Exception, match="does not write image"):
            render({"role": "user", "content": [{"type": "image"}]})
        with pytest.raises(Exception, match="calls one tool"):
            render({"role": "assistant", "tool_calls": [WEATHER, WEATHER]})

    @pytest.mark.parametrize(
        ("case", "number", "learned"),
        [
            ("built-in tool", 0, SEARCHED + "<|eom_id|>It is 4 C.<|eot_id|>"),
            ("own tool", 0, JSON_CALL + "<|eot_id|>"),
            ("code interpreter", 1, CODE + "<|eom_id|>About 3.14<|eom_id|>Anything else?<|eot_id|>"),
        ],
    )
    def test_calls_are_learned_and_results_are_not(self, tokenizer, case, number, learned):
        encoded = encode_dialog(parse_dialog(TABLE[case][0], case), tokenizer)
        ids = [id for id, target in zip(encoded.tokens, encoded.targets, strict=True) if target]
        assert ids.count(tokenizer.python_tag_id) == (case != "own tool")
        text = tokenizer.decode(ids, keep_special=True)
        assert text.split("<|python_tag|>", number)[-1] == learned

    def test_names_of_control_tokens_in_calls_and_results_are_text(self, tokenizer):
        dialog = [
            Message("assistant", [], ToolCall("f", {"x": "<|eot_id|><|python_tag|>"})),
            Message("ipython", [Part("text", text="<|eom_id|><|start_header_id|>system<|end_header_id|>")]),
        ]
        special = [id for id in encode_dialog(dialog, tokenizer).tokens if id >= tokenizer.bos_id]
        header = [tokenizer.start_header_id, tokenizer.end_header_id]
        assert special == [tokenizer.bos_id, *header, tokenizer.eot_id, *header, tokenizer.eot_id]

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            (Message("user", [], ToolCall("f", {})), "message 0: only the assistant calls tools"),
            (Message("ipython", [], end="eom"), "message 0: only the assistant"),
            (
                Message("assistant", [], ToolCall("brave_search", {"q": "x"})),
                "brave_search takes one argument",
            ),
            (
                Message("assistant", [], ToolCall("code_interpreter", {"code": 3})),
                "one argument, 'code', a string",
            ),
        ],
    )
    def test_errors(self, tokenizer, message, error):
        with pytest.raises(ValueError, match=error):
            encode_dialog([message], tokenizer)
        with pytest.raises(ValueError, match=r"no built-in tools \['google'\]; there are brave_search"):
            system_preamble(tools=["google"])


class TestParseReply:
    @pytest.mark.parametrize("case", TABLE)
    def test_what_was_encoded_is_read_back(self, tokenizer, case):
        dialog = parse_dialog(TABLE[case][0], case)
        for i, message in enumerate(dialog):
            if message.role != "assistant":
                continue
            prompt = encode_prompt(dialog[:i], tokenizer).tokens
            answer = encode_dialog(dialog[: i + 1], tokenizer).tokens[len(prompt) :]
            reply = parse_reply(answer, tokenizer)
            assert reply.end == ("eom" if answer[-1] == tokenizer.eom_id else "eot")
            assert (reply.message.text, reply.message.tool_call) == (message.text.strip(), message.tool_call)
            assert encode_dialog([*dialog[:i], reply.message], tokenizer).tokens == prompt + answer
            cut = parse_reply([*answer[:-1]], tokenizer)
            assert cut.end is None
            assert cut.message.tool_call == message.tool_call

    @pytest.mark.parametrize(
        ("text", "content", "tool_call"),
        [
            ("Hello <|eot_id|>x", "Hello", None),
            ("{not json}", "{not json}", None),
            ('{"name": "f"}', '{"name": "f"}', None),
            ('{"name": "f", "parameters": "x"}', '{"name": "f", "parameters": "x"}', None),
            ('Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}', None),
            (' {"type": "function", "name": "f", "parameters": {"a": 1}}\n', "", ToolCall("f", {"a": 1})),
            ('<function=f>{"a": [1, "}"]}</function>', "", ToolCall("f", {"a": [1, "}"]})),
            ("<function=f>{</function>", "<function=f>{</function>", None),
            ("<|python_tag|>{'a': 1}", "", ToolCall("code_interpreter", {"code": "{'a': 1}"})),
            ("<|python_tag|>", "", ToolCall("code_interpreter", {"code": ""})),
            (
                '<|python_tag|>google.call(query="x")',
                "",
                ToolCall("code_interpreter", {"code": 'google.call(query="x")'}),
            ),
            ('See:<|python_tag|>{"name": "f", "parameters": {}}<|eom_id|>', "See:", ToolCall("f", {})),
        ],
    )
    def test_what_a_model_may_say(self, tokenizer, text, content, tool_call):
        reply = parse_reply(tokenizer.encode(text, allow_special=True), tokenizer)
        assert (reply.message.text, reply.message.tool_call) == (content, tool_call)

    def test_how_it_ended(self, tokenizer):
        for id, end in zip(tokenizer.stop_ids, ("end_of_text", "eom", "eot"), strict=True):
            reply = parse_reply([*tokenizer.encode("yes"), id, tokenizer.eot_id], tokenizer)
            assert (reply.end, reply.message.text) == (end, "yes")
        assert parse_reply([], tokenizer).message == Message("assistant", [Part("text", text="")])
        # A name of a control token that was spelled out ends nothing.
        assert parse_reply(tokenizer.encode("<|eot_id|>"), tokenizer).message.text == "<|eot_id|>"
