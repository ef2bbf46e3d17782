import builtins
import csv
import datetime
import json

import pytest
from herdkit.data.drafts import Draft, Problem
from herdkit.data.manifests import Columns, Manifest

parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow  # noqa: E402


def drafts(path, columns=None, **options):
    return list(Manifest(path, columns, **options))


def content(draft):
    """Members with JSON parsed and files by name."""
    assert isinstance(draft, Draft), draft
    found = {}
    for name, value in draft.members.items():
        found[name] = (json.loads(value) if name == "json" else value) if isinstance(value, bytes) else value.name
    return found


def reasons(found):
    return [str(item) for item in found if isinstance(item, Problem)]


COLUMNS = Columns(key="id", files={"image": None, "sound": "speech.wav"}, texts={"caption": "txt"})
ROWS = [
    {"id": "a1", "image": "x/1.JPG", "sound": "1.wav", "caption": "one, two", "score": "0.5"},
    {"id": "b/2", "image": "2.png", "sound": "2", "caption": 'a "quoted"\nline', "score": "é"},
]
MADE = [
    {"jpg": "1.JPG", "speech.wav": "1.wav", "txt": b"one, two", "json": {"score": "0.5"}},
    {"png": "2.png", "speech.wav": "2", "txt": b'a "quoted"\nline', "json": {"score": "é"}},
]


def test_the_same_rows_in_every_form(tmp_path):
    pandas_like = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(pandas_like, tmp_path / "t.parquet", row_group_size=1)
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS))
    for name, delimiter, encoding in [("t.csv", ",", "utf-8"), ("t.tsv", "\t", "utf-8-sig")]:
        with (tmp_path / name).open("w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for name in ["t.parquet", "t.jsonl", "t.csv", "t.tsv"]:
        found = drafts(tmp_path / name, COLUMNS)
        assert [draft.key for draft in found] == ["a1", "b/2"]
        assert [content(draft) for draft in found] == MADE
        assert found[0].members["jpg"] == tmp_path / "x" / "1.JPG"
    assert [draft.where for draft in drafts(tmp_path / "t.jsonl", COLUMNS)] == [
        f"{tmp_path / 't.jsonl'}:1",
        f"{tmp_path / 't.jsonl'}:3",
    ]


def test_keys_are_row_numbers_by_default(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("word\nx\ny\n")
    found = drafts([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert [draft.key for draft in found] == [f"{i:09d}" for i in range(4)]
    assert content(found[3]) == {"json": {"word": "y"}}
    (tmp_path / "c.jsonl").write_text('{"word": "x"}\n[]\n{"word": "z"}\n')
    good, _, last = drafts(tmp_path / "c.jsonl")
    assert (good.key, last.key) == ("000000000", "000000002")


def test_keys_may_be_whole_numbers(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": 17}\n{"id": 1.5}\n{"id": true}\n{"id": null}\n{"id": ""}\n{}\n{"id": 1, "a": 2}\n')
    found = drafts(path, Columns(key="id"))
    assert isinstance(found[0], Draft)
    assert found[0].key == "17"
    assert reasons(found) == [
        f"{path}:2: column id: a key is text or a whole number, not 1.5",
        f"{path}:3: column id: a key is text or a whole number, not True",
        f"{path}:4: no key: column id is empty",
        f"{path}:5: no key: column id is empty",
        f"{path}:6: no key: column id is not there",
    ]


def test_values_that_are_missing(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"image": "a.jpg", "text": ""}\n{"text": "b"}\n{"image": null, "text": "c"}\n')
    columns = {"files": {"image": None}, "texts": {"text": "txt"}}
    assert reasons(drafts(path, Columns(**columns))) == [
        f"{path}:1: sample 000000000: column text is empty",
        f"{path}:2: sample 000000001: column image is not there",
        f"{path}:3: sample 000000002: column image is empty",
    ]
    found = drafts(path, Columns(**columns, missing="omit"))
    assert [content(draft) for draft in found] == [{"jpg": "a.jpg"}, {"txt": b"b"}, {"txt": b"c"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON: "),
        (b'{"a": "\xff"}', "not UTF-8: byte 8 of the line"),
        (b'["a"]', "an object is needed, not list"),
        (b'{"a": NaN}', "cannot become JSON: "),
        (b'{"a": 1e999}', "cannot become JSON: "),
        (rb'{"a": "\ud800"}', "not Unicode text"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON: "),
        (b'{"image": "http://x.org/1.jpg"}', "column image: http://x.org/1.jpg is an address; download it first"),
        (b'{"image": "photo"}', "column image: 'photo' has no extension; say which"),
        (b'{"image": 5}', "column image must hold text, not int"),
        (b'{"image": "a.jpg", "other": "b.jpg"}', "two members are called jpg"),
    ],
)
def test_lines_of_json_that_are_wrong(tmp_path, line, reason):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"image": "1.jpg", "other": "a.png"}\n' + line + b'\n{"image": "2.jpg"}\n')
    first, wrong, last = drafts(path, Columns(files={"image": None, "other": None}, missing="omit"))
    assert isinstance(wrong, Problem)
    assert str(wrong).startswith(f"{path}:2: ")
    assert wrong.reason.startswith(reason)
    assert content(first) == {"jpg": "1.jpg", "png": "a.png"}
    assert content(last) == {"jpg": "2.jpg"}


def test_rows_of_csv_that_are_wrong(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'a,b\n1,2\n3\n4,"5\n6",7\n\xff,8\n"9"x,10\n11,"12\n13"\n14,"15\n')
    found = drafts(path)
    assert reasons(found) == [
        f"{path}:3: has 1 fields, and the header 2",
        f"{path}:4: has 3 fields, and the header 2",
        f"{path}:6: not UTF-8",
        f"{path}:7: no CSV: ',' expected after '\"'",
        f"{path}:10: no CSV: unexpected end of data",
    ]
    good = [content(draft)["json"] for draft in found if isinstance(draft, Draft)]
    assert good == [{"a": "1", "b": "2"}, {"a": "11", "b": "12\n13"}]


def test_long_fields(tmp_path):
    (tmp_path / "t.csv").write_text(f"text\n{'x' * 1_000_000}\n")
    (found,) = drafts(tmp_path / "t.csv", Columns(texts={"text": "txt"}))
    assert len(found.members["txt"]) == 1_000_000


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"", "empty, without even a header"),
        (b"a,a\n", "the header has 'a' twice"),
        (b"a,,b\n", "the header has a column without a name"),
        ("a,b\n".encode("utf-16"), "the header is not UTF-8; convert the file"),
        (b"a;b\n1;2\n", "no column 'b'; its columns are 'a;b'"),
    ],
)
def test_headers_that_are_wrong(tmp_path, head, error):
    (tmp_path / "t.csv").write_bytes(head)
    with pytest.raises(ValueError, match=error):
        drafts(tmp_path / "t.csv", Columns(key="b"))


def test_delimiter(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n1;2,5\n")
    (found,) = drafts(tmp_path / "t.csv", delimiter=";")
    assert content(found) == {"json": {"a": "1", "b": "2,5"}}


def test_columns_that_no_row_has(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg"}\n')
    for columns in [Columns(files={"imge": None}, missing="omit"), Columns(dropped=("imge",))]:
        with pytest.raises(ValueError, match=r"t.jsonl: no row has the column 'imge'"):
            drafts(tmp_path / "t.jsonl", columns)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"key": "a", "files": {"a": None}}, "column 'a' is given two uses"),
        ({"texts": {"a": "TXT"}}, "'TXT' is no lower-case extension"),
        ({"files": {"a": "x/y"}}, "'x/y' is no lower-case extension"),
        ({"missing": "skip"}, "missing must be"),
    ],
)
def test_wrong_columns(wrong, error):
    with pytest.raises(ValueError, match=error):
        Columns(**wrong)


def test_which_files_are_manifests(tmp_path):
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(ValueError, match=r"t.xlsx: a manifest is a file that ends with .csv, .tsv"):
        Manifest(tmp_path / "t.xlsx")
    with pytest.raises(FileNotFoundError, match=r"t.csv: no such file"):
        Manifest(tmp_path / "t.csv")


DIALOG = [
    {"role": "user", "content": [{"type": "image", "image": "p/1.PNG"}, {"type": "text", "text": "Which?"}]},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": [{"type": "image", "image": "2.png"}, {"type": "image", "image": "p/1.PNG"}]},
    {"role": "user", "content": [{"type": "audio", "audio": "q.flac"}]},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_dialogs(tmp_path, form):
    path = tmp_path / f"t.{form}"
    row = {"talk": DIALOG, "source": "web"}
    if form == "jsonl":
        path.write_text(json.dumps(row))
    elif form == "csv":
        text = json.dumps(DIALOG).replace('"', '""')
        path.write_text(f'talk,source\n"{text}",web\n')
    else:
        messages = [dict(message) for message in DIALOG]
        for message in messages:  # a column has one type
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        parquet.write_table(pyarrow.Table.from_pylist([{**row, "talk": messages}]), path)
    (found,) = drafts(path, Columns(dialog="talk"))
    made = content(found)
    messages = made.pop("json")["messages"]
    assert made == {"0.png": "1.PNG", "1.png": "2.png", "flac": "q.flac"}
    assert found.members["0.png"] == tmp_path / "p" / "1.PNG"
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    assert [part[part["type"]] for part in parts if part["type"] != "text"] == ["0.png", "1.png", "0.png", "flac"]
    assert messages[0]["content"][1] == {"type": "text", "text": "Which?"}
    assert messages[4]["tool_calls"] == DIALOG[4]["tool_calls"]
    assert json.loads(found.members["json"])["source"] == "web"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"talk": []}, "column talk: messages is empty"),
        ({"talk": "no"}, "column talk is not JSON"),
        ({"talk": None}, "column talk is empty"),
        ({}, "column talk is not there"),
        ({"talk": [{"role": "bot", "content": ""}]}, "column talk: messages[0].role must be one of"),
        (
            {"talk": [{"role": "user", "content": [{"type": "image", "image": [1]}]}]},
            "column talk: image must be a path",
        ),
        ({"talk": [{"role": "user", "content": "x"}], "messages": []}, "the dialog of column talk takes the place of"),
    ],
)
def test_dialogs_that_are_wrong(tmp_path, row, reason):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"talk": [{"role": "user", "content": "x"}]}) + "\n" + json.dumps(row))
    good, wrong = drafts(path, Columns(dialog="talk"))
    assert content(good) == {"json": {"messages": [{"role": "user", "content": "x"}]}}
    assert wrong.reason.startswith(reason)


def test_parquet_with_contents(tmp_path):
    path = tmp_path / "t.parquet"
    rows = [
        {"image": {"bytes": b"jpeg", "path": "x/1.JPG"}, "raw": b"pcm", "when": datetime.date(2024, 5, 1), "n": 1},
        {"image": {"bytes": None, "path": "2.jpg"}, "raw": b"", "when": None, "n": 2},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    good, bad = drafts(path, Columns(contents={"image": None, "raw": "pcm"}))
    assert content(good) == {"jpg": b"jpeg", "pcm": b"pcm", "json": {"when": "2024-05-01", "n": 1}}
    assert str(bad) == f"{path}: row 2: sample 000000001: column image must hold the bytes of a file, and holds none"
    (bad, _) = drafts(path, Columns(contents={"image": None, "raw": None}))
    assert "column raw does not tell the kind of file" in bad.reason
    (bad, _) = drafts(path, Columns(dropped=("image",)))
    assert "cannot become JSON: a value of type bytes; drop its column" in bad.reason
    (good, _) = drafts(path, Columns(dropped=("image", "raw", "when")))
    assert content(good) == {"json": {"n": 1}}


def test_parquet_that_is_none(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"a": "x" * 100}] * 1000), path)
    whole = path.read_bytes()
    for wrong in [b"", b"no parquet" * 10, whole[:-100], whole[: len(whole) // 2]]:
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"t.parquet: cannot be read"):
            drafts(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="no column 'b'"):
        drafts(path, Columns(key="b"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").touch()
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "herdkit\[parquet\]"'):
        drafts(tmp_path / "t.parquet")
