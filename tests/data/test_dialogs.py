import json

import pytest
from herdkit.data.dialogs import DialogError, Message, Part, ToolCall, dialog_sample, parse_dialog
from herdkit.data.shards import Sample


def sample(content, **members):
    stored = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return Sample("000017", "made/a.tar", {"json": stored, **members})


def test_text_and_parts():
    dialog = parse_dialog(
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A square."},
            {"role": "ipython", "content": "4"},
        ],
        "here",
    )
    assert dialog[0] == Message("system", [Part("text", text="")])
    assert dialog[1] == Message("user", [Part("image", media="png"), Part("text", text="What is it?")])
    assert [message.text for message in dialog] == ["", "What is it?", "A square.", "4"]
    assert dialog[1].media == [Part("image", media="png")]
    assert parse_dialog(dialog, "again") == dialog


WEATHER = {"name": "weather", "arguments": {"city": "Oslo"}}


def test_tool_calls_and_results():
    written = {"type": "function", "id": "call_1", "function": WEATHER | {"arguments": '{"city": "Oslo"}'}}
    dialog = parse_dialog(
        [
            {"role": "assistant", "content": None, "tool_calls": [{"function": WEATHER}]},
            {"role": "assistant", "tool_calls": [written], "end": "eom"},
            {"role": "tool", "content": "4", "tool_call_id": "call_1", "name": "weather"},
            {"role": "assistant", "content": "4", "tool_calls": None, "end": None},
        ],
        "here",
    )
    call = ToolCall("weather", {"city": "Oslo"})
    assert dialog[0] == Message("assistant", [Part("text", text="")], call)
    assert dialog[1] == Message("assistant", [Part("text", text="")], call, "eom")
    assert dialog[2] == Message("ipython", [Part("text", text="4")])
    assert dialog[3] == Message("assistant", [Part("text", text="4")])
    assert parse_dialog(dialog, "again") == dialog


def called(**changes):
    return [{"role": "assistant", "tool_calls": [{"type": "function", "function": WEATHER | changes}]}]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "assistant", "tool_calls": []}], r"messages\[0\].content is missing"),
        ([{"role": "assistant", "tool_calls": {}, "content": ""}], "tool_calls must be a list of one call"),
        ([{"role": "assistant", "tool_calls": called()[0]["tool_calls"] * 2}], "tool_calls must be a list of one call"),
        ([{"role": "assistant", "tool_calls": ["f"]}], r"tool_calls\[0\] must be an object with a function, not str"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\].function is missing"),
        ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], "function must be an object"),
        ([{"role": "assistant", "tool_calls": [{"type": "x", "function": WEATHER}]}], "its type 'function'"),
        (called(strict=True), r"tool_calls\[0\].function has an unknown field 'strict'"),
        (called(name=""), "name must be the name of a tool, not ''"),
        (called(arguments="{"), "arguments is a string, but not JSON"),
        (called(arguments="3"), "arguments must be an object, not int"),
        ([{"role": "assistant", "content": "", "end": "stop"}], "end must be one of eom, eot, not 'stop'"),
        ([{"role": "user", "content": "", "end": "eom"}], "unknown field 'end'"),
    ],
)
def test_errors_of_tool_calls(messages, error):
    with pytest.raises(DialogError, match=error):
        parse_dialog(messages, "here")


def test_text_of_several_parts_keeps_their_order():
    parts = [Part("text", text="a"), Part("audio", media=b"x"), Part("text", text="b")]
    assert Message("user", parts).text == "ab"


def test_media_of_any_form_and_of_third_parties():
    marker = object()
    parts = [{"type": "depth", "depth": marker}, {"type": "image", "image": b"bytes"}]
    dialog = parse_dialog([{"role": "user", "content": parts}], "chat", {"image", "depth"})
    assert dialog[0].parts[0] == Part("depth", media=marker)
    with pytest.raises(DialogError, match="video"):
        parse_dialog([{"role": "user", "content": [{"type": "video", "video": "a"}]}], "chat", {"image"})


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hello", "here: messages must be a list, not str"),
        (None, "here: messages must be a list, not null"),
        ([], "here: messages is empty"),
        (["hello"], r"here: messages\[0\] must be an object with role and content, not str"),
        ([{"content": "x"}], r"here: messages\[0\].role is missing; the fields there are 'content'"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "robot", "content": ""}], r"messages\[0\].role must be one of .*ipython, not 'robot'"),
        ([{"role": ["user"], "content": ""}], r"messages\[0\].role must be one of"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be a string or a list of parts, not null"),
        ([{"role": "user", "content": []}], r"messages\[0\].content is empty"),
        ([{"role": "user", "content": "", "tool_calls": 1}], r"messages\[0\] has an unknown field 'tool_calls'"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] must be an object with a type, not str"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"content\[0\].type is missing; .* 'text'"),
        ([{"role": "user", "content": [{"type": "smell", "smell": 1}]}], "must be one of text, image, video, audio"),
        ([{"role": "user", "content": [{"type": 3}]}], r"content\[0\].type must be one of"),
        ([{"role": "user", "content": [{"type": "text", "txt": ""}]}], r"content\[0\].text is missing"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"content\[0\].text must be a string, not int"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\].image is missing"),
        ([{"role": "user", "content": [{"type": "image", "image": ""}]}], r"content\[0\].image is empty"),
        ([{"role": "user", "content": [{"type": "image", "image": None}]}], r"content\[0\].image is empty"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "user", "content": ["x", {"type": "image", "image": "png", "detail": "low"}][1:]},
            ],
            r"messages\[1\].content\[0\] has an unknown field 'detail'",
        ),
    ],
)
def test_errors_name_place_and_field(messages, error):
    with pytest.raises(DialogError, match=error) as caught:
        parse_dialog(messages, "here")
    assert "\n" not in str(caught.value)


def test_message_objects_are_checked_too():
    with pytest.raises(DialogError, match="role"):
        parse_dialog([Message("robot", [])], "here")
    with pytest.raises(DialogError, match="image is empty"):
        parse_dialog([Message("user", [Part("image")])], "here")


def test_stored_sample():
    parts = [{"type": "image", "image": "png"}, {"type": "audio", "audio": "wav"}, {"type": "image", "image": "png"}]
    content = {"messages": [{"role": "user", "content": parts}], "source": "made"}
    dialog = dialog_sample(sample(content, png=b"picture", wav=b"sound"))
    assert [part.media for part in dialog[0].parts] == [b"picture", b"sound", b"picture"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{broken", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ([1], "must be an object with 'messages', but holds list"),
        ({"conversations": []}, "must be an object with 'messages', but holds the fields 'conversations'"),
        ({"messages": []}, "messages is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "jpg"}]}]},
            r"messages\[0\].content\[0\].image: no member 'jpg'; there are 'json', 'png'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]},
            r"messages\[0\].content\[0\].image must be a member's extension, not int",
        ),
    ],
)
def test_errors_of_stored_samples_name_the_sample(content, error):
    with pytest.raises(DialogError, match=error) as caught:
        dialog_sample(sample(content, png=b"picture"))
    assert str(caught.value).startswith("made/a.tar: sample 000017")


def test_sample_without_json():
    with pytest.raises(DialogError, match=r"made/a.tar: sample 1: no member 'json'; its members are 'txt'"):
        dialog_sample(Sample("1", "made/a.tar", {"txt": b"x"}))
