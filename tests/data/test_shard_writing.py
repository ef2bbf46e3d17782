import hashlib
import io
import json
import os
import random
import signal
import tarfile
import tracemalloc

import numpy as np
import pytest
import soundfile
import webdataset
from herdkit.data.drafts import Draft, InputError, Problem
from herdkit.data.folder_tree import FolderTree
from herdkit.data.manifests import Columns, Manifest
from herdkit.data.shard_writing import write_shards
from herdkit.data.shards import ShardError, ShardReader
from PIL import Image


def made_tree(folder, count=30, seed=0):
    """Samples in two folders, written in random order."""
    names = [(f"{'ab'[i % 2]}/{i:03d}", i) for i in range(count)]
    random.Random(seed).shuffle(names)
    for name, i in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(f"text {i}")
        path.with_suffix(".bin").write_bytes(bytes([i]) * (i + 1))
    return FolderTree(folder)


def right(count=30):
    order = [*range(0, count, 2), *range(1, count, 2)]
    return [(f"{'ab'[i % 2]}/{i:03d}", {"bin": bytes([i]) * (i + 1), "txt": f"text {i}".encode()}) for i in order]


def contents(paths):
    return [(sample.key, sample.members) for sample in ShardReader(paths)]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_other_readers_find_the_same(tmp_path):
    written = write_shards(tmp_path / "made" / "x-%d.tar", made_tree(tmp_path / "tree"), max_count=11)
    assert [path.name for path in written.shards] == ["x-0.tar", "x-1.tar", "x-2.tar"]
    assert (written.samples, written.skipped) == (30, 0)
    assert written.bytes == sum(path.stat().st_size for path in (tmp_path / "tree").rglob("*.*"))
    assert contents(written.shards) == right()
    by_tarfile = []
    for path in written.shards:
        with tarfile.open(path) as tar:
            by_tarfile += [(member.name, tar.extractfile(member).read()) for member in tar]
    assert by_tarfile == [(f"{key}.{name}", value) for key, members in right() for name, value in members.items()]
    dataset = webdataset.WebDataset([str(path) for path in written.shards], shardshuffle=False)
    by_webdataset = [(s["__key__"], {n: v for n, v in s.items() if n[:2] != "__"}) for s in dataset]
    assert by_webdataset == right()


@pytest.mark.parametrize("shuffle", [None, 3])
def test_same_bytes_whoever_writes(tmp_path, shuffle):
    for name, seed, workers, mask in [("one", 0, 1, 0o022), ("two", 1, 3, 0o077)]:
        tree = made_tree(tmp_path / name / "tree", seed=seed)
        for path in (tmp_path / name / "tree").rglob("*.*"):
            os.utime(path, (seed * 1000, seed * 2000))
            path.chmod(0o600 + seed)
        before = os.umask(mask)
        write_shards(tmp_path / name / "made" / "%d.tar", tree, max_count=7, shuffle=shuffle, workers=workers)
        os.umask(before)
    assert digests(tmp_path / "one" / "made") == digests(tmp_path / "two" / "made")
    assert len(digests(tmp_path / "one" / "made")) == 5


def test_shuffled(tmp_path):
    tree = made_tree(tmp_path / "tree")

    def order(seed):
        return contents(write_shards(tmp_path / "%d.tar", tree, shuffle=seed, existing="replace").shards)

    plain, one, two = right(), order(0), order(1)
    assert sorted(one) == sorted(two) == sorted(plain)
    places = {key: place for place, (key, _) in enumerate(plain)}
    for other in (one, two):
        moves = [abs(places[key] - place) for place, (key, _) in enumerate(other)]
        assert 5 < sum(moves) / len(moves) < 15  # 10 on average for a random order of 30
    assert one != two
    assert order(0) == one


def test_the_order_of_a_seed_stays_the_same_in_later_versions(tmp_path):
    drafts = [Draft("here", str(i), {"txt": b"x"}) for i in range(12)]
    shards = write_shards(tmp_path / "%d.tar", drafts, shuffle=0).shards
    assert [int(key) for key, _ in contents(shards)] == [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]


def test_tables_shuffled_with_what_they_hold(tmp_path):
    rows = [{"id": i, "text": f"é {i}\n" * (i % 5 + 1), "more": {"n": i}} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = Manifest(tmp_path / "t.jsonl", Columns(key="id", texts={"text": "txt"}))
    plain = contents(write_shards(tmp_path / "plain-%d.tar", manifest).shards)
    shuffled = contents(write_shards(tmp_path / "shuffled-%d.tar", manifest, shuffle=0, max_count=9).shards)
    assert [key for key, _ in plain] == [str(i) for i in range(40)]
    assert sorted(shuffled) == sorted(plain)
    assert shuffled != plain
    assert plain[7][1] == {"json": b'{"more": {"n": 7}}', "txt": "é 7\né 7\né 7\n".encode()}
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"plain", "shuffled", "t.jsonl"}


def test_sizes(tmp_path):
    samples = [Draft("here", str(i), {"bin": b"x" * (2000 if i == 1 else 400)}) for i in range(5)]
    shards = write_shards(tmp_path / "%d.tar", samples, max_bytes=1000).shards
    assert [len(ShardReader(path)) for path in shards] == [1, 1, 2, 1]


def wrong_tree(tmp_path):
    tree = made_tree(tmp_path / "tree", 8)
    (tmp_path / "tree" / "a" / "002.txt").write_text("")
    (tmp_path / "tree" / "b" / "003.bin").unlink()
    (tmp_path / "tree" / "b" / "003.bin").symlink_to("nowhere")
    (tmp_path / "tree" / "b" / "005.bin").unlink()
    (tmp_path / "tree" / "b" / "005.bin").symlink_to("005.bin")
    os.mkfifo(tmp_path / "tree" / "b" / "pipe.txt")
    (tmp_path / "tree" / "b" / "odd..txt").write_text("x")
    (tmp_path / "tree" / "b" / "byte\udcff.txt").write_text("x")
    return tree


PROBLEMS = [
    ("a/002", "002.txt is empty"),
    ("b/003", "003.bin: no such file"),
    ("b/005", "005.bin: a link that leads back to itself"),
    ("", "not Unicode text"),
    ("", "'.txt' is no lower-case extension"),
    ("b/pipe", "pipe.txt is no regular file"),
]


def test_all_problems_are_told_before_anything_is_written(tmp_path):
    tree = wrong_tree(tmp_path)
    with pytest.raises(InputError) as caught:
        write_shards(tmp_path / "made" / "%d.tar", tree, report=tmp_path / "report.jsonl")
    assert caught.value.count == len(PROBLEMS)
    for problem, (key, reason) in zip(caught.value.problems, PROBLEMS, strict=True):
        assert problem.key == key
        assert reason in problem.reason
    assert str(caught.value).startswith(f"{tmp_path / 'tree' / 'a'}: sample a/002: ")
    assert str(caught.value).endswith("002.txt is empty; 5 more of 6 problems")
    assert str(caught.value).isprintable()
    assert list((tmp_path / "made").iterdir()) == []
    report = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [(one["key"], one["reason"]) for one in report] == [(f.key, f.reason) for f in caught.value.problems]


@pytest.mark.parametrize("shuffle", [None, 0])
def test_problems_are_left_out_and_reported(tmp_path, shuffle):
    tree = wrong_tree(tmp_path)
    written = write_shards(
        tmp_path / "made" / "%d.tar", tree, on_bad="skip", report=tmp_path / "report.jsonl", shuffle=shuffle
    )
    good = [one for one in right(8) if one[0] not in dict(PROBLEMS)]
    assert sorted(contents(written.shards)) == sorted(good)
    assert written.skipped == len(PROBLEMS)
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == len(PROBLEMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "report.jsonl", "tree"]


def test_keys_in_tables(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    keys = ["a", "../up", "/abs", "b\0c", "a", "d.e", "a/b", "a", "__x__", "a//b"]
    rows = [{"id": key, "file": "x\0.txt" if key == "a/b" else "x.txt"} for key in keys]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = Manifest(tmp_path / "t.jsonl", Columns(key="id", files={"file": None}))
    written = write_shards(tmp_path / "%d.tar", manifest, on_bad="skip")
    assert [key for key, _ in contents(written.shards)] == ["a", "a//b"]
    places = [int(problem.where.rpartition(":")[2]) for problem in written.problems]
    assert places == [2, 3, 4, 6, 7, 9, 5, 8]  # keys that come twice are found last
    reasons = [problem.reason for problem in written.problems]
    for reason, part in zip(
        reasons,
        ["inside its folder", "inside its folder", "no NUL", "no dot", "NUL", "no __name__", "t.jsonl:1", "t.jsonl:1"],
        strict=True,
    ):
        assert part in reason
    assert all(str(problem).isprintable() for problem in written.problems)


def test_keys_of_equal_digests_are_not_confused(tmp_path, monkeypatch):
    monkeypatch.setattr("herdkit.data.shard_writing._digest", lambda key: 7)
    tree = made_tree(tmp_path / "tree", 6)
    assert contents(write_shards(tmp_path / "made" / "%d.tar", tree).shards) == right(6)


def test_nothing_to_write(tmp_path):
    (tmp_path / "tree").mkdir()
    with pytest.raises(ShardError, match="the input holds no samples"):
        write_shards(tmp_path / "%d.tar", FolderTree(tmp_path / "tree"))
    with pytest.raises(InputError, match="here: gone"):
        write_shards(tmp_path / "%d.tar", [Problem("here", "", "gone")], on_bad="skip")
    broken = Draft("here", "a", {"json": b"{"})
    with pytest.raises(InputError, match="here: sample a: json: not JSON"):
        write_shards(tmp_path / "%d.tar", [broken], on_bad="skip", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_input_that_changes_on_the_way(tmp_path):
    tree = made_tree(tmp_path / "tree", 4)

    def remove(what, done, total):
        if what == "writing":
            (tmp_path / "tree" / "b" / "003.txt").unlink(missing_ok=True)

    with pytest.raises(ShardError, match="the input has changed since it was looked at"):
        write_shards(tmp_path / "made-%d.tar", tree, progress=remove, max_count=3)
    assert [path.name for path in sorted(tmp_path.glob("made-*"))] == ["made-0.tar"]
    assert not list(tmp_path.glob(".*"))


def test_file_that_goes_on_the_way(tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file in files:
        file.write_text("x")

    def remove(what, done, total):
        if what == "writing":
            files[2].unlink(missing_ok=True)

    drafts = [Draft("here", file.stem, {"txt": file}) for file in files]
    with pytest.raises(InputError, match=r"here: sample 2: .*2.txt: no such file"):
        write_shards(tmp_path / "made-%d.tar", drafts, progress=remove)
    assert not list(tmp_path.glob("*made-*"))


def test_input_that_can_be_gone_through_once(tmp_path):
    with pytest.raises(ShardError, match="the input has changed"):
        write_shards(tmp_path / "a-%d.tar", iter([Draft("here", "a", {"txt": b"x"})]))


def test_wrong_arguments(tmp_path):
    for wrong in [{"on_bad": "stop"}, {"workers": 0}, {"shuffle": -1}, {"max_count": 0}, {"existing": "append"}]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            write_shards(tmp_path / "%d.tar", [Draft("here", "a", {"txt": b"x"})], **wrong)


def test_existing_shards(tmp_path):
    tree = made_tree(tmp_path / "tree", 10)
    write_shards(tmp_path / "made" / "%d.tar", tree, max_count=2)
    before = digests(tmp_path / "made")
    with pytest.raises(ShardError, match=r"0.tar exists already, as one of 5 shards; remove or replace them"):
        write_shards(tmp_path / "made" / "%d.tar", tree)
    (tmp_path / "tree" / "a" / "000.txt").write_text("")
    with pytest.raises(InputError):  # and what there is stays
        write_shards(tmp_path / "made" / "%d.tar", tree, existing="replace")
    assert digests(tmp_path / "made") == before
    write_shards(tmp_path / "made" / "%d.tar", tree, existing="replace", on_bad="skip", max_count=5)
    assert sorted(digests(tmp_path / "made")) == ["0.tar", "1.tar"]


def test_killed(tmp_path):
    tree = made_tree(tmp_path / "tree", 20)
    write_shards(tmp_path / "whole" / "%d.tar", tree, max_count=4)
    whole = digests(tmp_path / "whole")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:

        def stop(what, done, total):
            if what == "writing" and done == 10:
                os.write(writing, b"x")
                signal.pause()

        try:
            write_shards(tmp_path / "made" / "%d.tar", tree, max_count=4, progress=stop)
        finally:
            os._exit(1)
    os.close(writing)  # so that the end of a child that fails is seen
    assert os.read(reading, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = digests(tmp_path / "made")
    partial = [name for name in left if name not in whole]
    assert {name: digest for name, digest in left.items() if name in whole} == {n: whole[n] for n in ["0.tar", "1.tar"]}
    assert [name.startswith(".") for name in partial] == [True]
    assert contents(tmp_path / "made") == right(20)[:8]
    with pytest.raises(ShardError, match="exists already"):
        write_shards(tmp_path / "made" / "%d.tar", tree, max_count=4)
    for index in (tmp_path / "made").glob("*.json"):
        index.unlink()
    write_shards(tmp_path / "made" / "%d.tar", tree, max_count=4, existing="replace")
    assert digests(tmp_path / "made") == whole


def picture(form):
    file = io.BytesIO()
    Image.fromarray(np.arange(3 * 40 * 30, dtype=np.uint8).reshape(30, 40, 3)).save(file, form)
    return file.getvalue()


def sound():
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(8000) / 9), 16_000, format="FLAC")
    return file.getvalue()


def media(video):
    dialog = {"messages": [{"role": "user", "content": [{"type": "image", "image": "png"}]}]}
    bad_dialog = {"messages": [{"role": "user", "content": [{"type": "image", "image": "jpg"}]}]}
    good = {"png": picture("PNG"), "jpg": picture("JPEG"), "flac": sound(), "mp4": video("mp4"), "npy": b"\x00\xff"}
    yield "good", {**good, "txt": "é".encode(), "json": json.dumps(dialog).encode()}, None
    yield "png", {"png": good["png"][:-40]}, "png: cannot decode the image"
    yield "jpg", {"jpg": good["png"][:100], "txt": b"x"}, "jpg: cannot decode the image"
    yield "other", {"seg.png": good["flac"]}, "seg.png: not an image"
    yield "flac", {"flac": good["flac"][:-500]}, "flac: "
    yield "mp4", {"mp4": good["mp4"][: len(good["mp4"]) // 2]}, "mp4: "
    yield "txt", {"txt": b"ab\xff"}, "txt: not UTF-8: byte 3"
    yield "json", {"json": b"{'a': 1}"}, "json: not JSON: "
    yield (
        "dialog",
        {"json": json.dumps(bad_dialog).encode(), "png": good["png"]},
        "messages[0].content[0].image: no member",
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_checked(tmp_path, video, workers):
    samples = list(media(video))
    drafts = [Draft("here", key, members) for key, members, _ in samples]
    written = write_shards(tmp_path / "all-%d.tar", drafts)
    assert written.samples == len(samples)
    options = {"check": True, "workers": workers}
    written = write_shards(tmp_path / "good-%d.tar", drafts, on_bad="skip", **options)
    assert contents(written.shards) == [("good", dict(sorted(samples[0][1].items())))]
    assert [problem.key for problem in written.problems] == [key for key, _, reason in samples if reason]
    for problem, reason in zip(written.problems, (reason for *_, reason in samples if reason), strict=True):
        assert problem.reason.startswith(reason)
    with pytest.raises(InputError, match=r"^here: sample png: png: cannot decode"):
        write_shards(tmp_path / "none-%d.tar", drafts, max_count=1, **options)
    assert [path.name for path in tmp_path.glob("none*")] == ["none-0.tar"]


@pytest.mark.parametrize("shuffle", [None, 0])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, shuffle):
    class Many:
        def __iter__(self):
            for i in range(150):
                yield Draft("here", str(i), {"bin": bytes([i]) * 200_000})

    tracemalloc.start()
    write_shards(tmp_path / "%d.tar", Many(), shuffle=shuffle, workers=2, max_count=40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6  # of 30e6 in all
