"""`herdkit shards write` as it is typed."""

import json

import pytest
from herdkit.cli import main
from herdkit.data import shard_writing
from herdkit.data.shards import ShardReader


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["shards", "write", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fill(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def test_a_folder(run, tmp_path):
    fill(tmp_path / "in", ["a.txt", "a.b", "c.txt", "README"])
    code, out, err = run("out/x-%03d.tar", "--from", "in", "--max-count", "1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "2 samples in 2 shards, 13 B: out/x-000.tar to out/x-001.tar"
    expected = {"shards": 2, "samples": 2, "bytes": 13, "skipped": 0, "pattern": "out/x-%03d.tar"}
    assert json.loads(lines[1]) == expected
    assert "left out, since they are hidden or have no extension: 1, such as in/README" in err
    assert [sample.members for sample in ShardReader("out")] == [{"b": b"a.b", "txt": b"a.txt"}, {"txt": b"c.txt"}]
    code, out, err = run("out/x-%03d.tar", "--from", "in")
    assert (code, out) == (1, "")
    assert err == "herdkit: out/x-000.tar exists already, as one of 2 shards; remove or replace them\n"
    assert run("out/x-%03d.tar", "--from", "in", "--existing", "replace")[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("*.tar*")] == ["x-000.tar"]


def test_tables(run, tmp_path):
    fill(tmp_path, ["1.jpg", "2.jpg", "3.PNG"])
    (tmp_path / "a.csv").write_text("id,image,caption,lang,junk\nx,1.jpg,one,en,0\ny,2.jpg,two,de,0\n")
    (tmp_path / "b.jsonl").write_text('{"id": 3, "image": "3.PNG", "caption": "three", "junk": null}\n')
    columns = ["--key", "id", "--file", "image", "--text", "caption=cap.txt", "--drop", "junk"]
    code, _, err = run("%d.tar", "--from", "a.csv", "b.jsonl", *columns, "--workers", "1", "--max-bytes", "1M")
    assert code == 0, err
    assert [(sample.key, sample.members) for sample in ShardReader("0.tar")] == [
        ("x", {"cap.txt": b"one", "jpg": b"1.jpg", "json": b'{"lang": "en"}'}),
        ("y", {"cap.txt": b"two", "jpg": b"2.jpg", "json": b'{"lang": "de"}'}),
        ("3", {"cap.txt": b"three", "png": b"3.PNG"}),
    ]


def test_every_problem_on_a_line(run, tmp_path):
    fill(tmp_path / "in", [f"{i:02d}.txt" for i in range(40)])
    for i in range(0, 40, 4):
        (tmp_path / "in" / f"{i:02d}.txt").write_text("")
    code, out, err = run("%d.tar", "--from", "in")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("in: sample")] == [
        f"in: sample {i:02d}: in/{i:02d}.txt is empty" for i in range(0, 40, 4)
    ]
    assert lines[-1] == "herdkit: in: sample 00: in/00.txt is empty; 9 more of 10 problems"
    assert not list(tmp_path.glob("*.tar"))
    code, out, err = run("%d.tar", "--from", "in", "--on-bad", "skip", "--report", "bad.jsonl")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["skipped"] == 10
    assert "in: sample 36: in/36.txt is empty" in err.splitlines()
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 10
    assert len(ShardReader("0.tar")) == 30


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["%d.tar", "--from", "none"], "none: no such file or folder"),
        (["%d.tar", "--from", "t.xlsx"], "t.xlsx: a manifest is a file that ends with"),
        (["%d.tar", "--from", "in", "t.csv"], "--from takes one folder, or tables"),
        (["%d.tar", "--from", "in", "--key", "id"], "in is a folder, and --key is about tables"),
        (["in/%d.tar", "--from", "in"], "in/%d.tar lies in in, which it is made of"),
        (["in/below/%d.tar", "--from", "in"], "lies in in, which it is made of"),
        (["x.tar", "--from", "in"], "the file name must hold one number"),
        (["%d.tar", "--from", "t.csv", "--key", "id"], "no column 'id'; its columns are 'a', 'b'"),
        (["%d.tar", "--from", "t.csv", "--file", "a", "--file", "a=b"], "--file names a column twice"),
        (["%d.tar", "--from", "t.csv", "--file", "a", "--text", "a"], "column 'a' is given two uses"),
        (["%d.tar", "--from", "t.csv", "--file", "a"], "t.csv:2: sample 000000000: column a: '1' has no extension"),
        (["%d.tar", "--from", "t.csv", "--delimiter", "tab"], "the delimiter of CSV is one character, not 'tab'"),
        (["%d.tar", "--from", "in", "--max-count", "0"], "max_count and max_bytes must be at least 1"),
    ],
)
def test_errors_are_one_line(run, tmp_path, arguments, error):
    fill(tmp_path / "in", ["a.txt"])
    fill(tmp_path, ["t.xlsx"])
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("herdkit: ")
    assert error in err.splitlines()[-1]
    assert sum(line.startswith("herdkit: ") for line in err.splitlines()) == 1
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["%d.tar"],
        ["%d.tar", "--from"],
        ["%d.tar", "--from", "in", "--max-bytes", "big"],
        ["%d.tar", "--from", "in", "--file", "=jpg"],
        ["%d.tar", "--from", "in", "--existing", "append"],
    ],
)
def test_wrong_usage(run, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("workers", ["1", "2"])
def test_interrupted(run, tmp_path, monkeypatch, workers):
    fill(tmp_path / "in", ["a.txt", "b.txt", "c.txt"])
    read = shard_writing._read

    def interrupted(draft, check):
        if draft.key == "c":
            raise KeyboardInterrupt
        return read(draft, check)

    monkeypatch.setattr(shard_writing, "_read", interrupted)
    code, _, err = run("out/%d.tar", "--from", "in", "--max-count", "1", "--workers", workers)
    assert code == 130
    assert err.endswith("herdkit: interrupted; complete shards stay; to begin anew add --existing replace\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.tar", "1.tar"]
