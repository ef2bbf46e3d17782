import hashlib
import io
import os
import subprocess
import tarfile
import threading

import numpy as np
import pytest
import webdataset
from herdkit.data import index_files
from herdkit.data.shard_index import ShardIndex
from herdkit.data.shards import ShardError, ShardReader, ShardWriter


def write(folder, count=10, name="made-%06d.tar", **options):
    with ShardWriter(folder / name, **options) as writer:
        for i in range(count):
            writer.write(f"{i:06d}", {"json": {"number": i, "word": "é"}, "txt": f"text {i}", "bin": bytes([i] * i)})
    return writer.shards


def contents(samples):
    return [(sample.key, sample.members) for sample in samples]


def plain(paths):
    """What webdataset itself reads."""
    dataset = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    return [
        (sample["__key__"], {name: value for name, value in sample.items() if name[:2] != "__"}) for sample in dataset
    ]


def test_round_trip(tmp_path):
    paths = write(tmp_path, 10, max_count=4)
    assert [path.name for path in paths] == ["made-000000.tar", "made-000001.tar", "made-000002.tar"]
    reader = ShardReader(tmp_path)
    assert len(reader) == 10
    for i, sample in enumerate(reader):
        assert (sample.key, sample.shard) == (f"{i:06d}", str(paths[i // 4]))
        assert sample.json() == {"number": i, "word": "é"}
        assert sample.text() == f"text {i}"
        assert sample.members["bin"] == bytes([i] * i)
        assert sample == reader[i] == reader[i - 10]
    for position in [10, -11]:
        with pytest.raises(IndexError):
            reader[position]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_webdataset_reads_ours(tmp_path):
    paths = write(tmp_path, 10, max_count=4)
    assert plain(paths) == contents(ShardReader(tmp_path))


def test_we_read_webdatasets(tmp_path):
    pattern = str(tmp_path / "theirs-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for i in range(7):
            name = "long/" * 30 + str(i)
            writer.write({"__key__": name, "seg.PNG": b"x" * i, "JSON": {"i": i}, "txt": "y"})
    reader = ShardReader(str(tmp_path / "theirs-{00..02}.tar"))
    assert contents(reader) == plain(sorted(tmp_path.glob("*.tar")))
    assert reader[6].members["seg.png"] == b"x" * 6


LONG = {"gnu": "ü" * 60, "pax": "ü" * 60, "posix": "ü" * 60, "ustar": "ü" * 48}


@pytest.mark.parametrize("form", LONG)
def test_we_read_tar(tmp_path, form):
    folder = tmp_path / "tree"
    (folder / "part.one" / "sub").mkdir(parents=True)
    (folder / "__meta__").mkdir()
    for name in [
        "part.one/a.txt",
        "part.one/a.seg.png",
        "part.one/sub/a.txt",
        "b.txt",
        "b.jpg",
        "README",
        ".hidden.txt",
    ]:
        (folder / name).write_text(name)
    (folder / "__meta__" / "c.txt").write_text("no sample")
    (folder / "b.link").symlink_to("b.txt")
    (folder / f"{LONG[form]}.txt").write_text("long name")
    path = tmp_path / "made.tar"
    names = sorted(entry.name for entry in folder.iterdir())
    subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", folder, *names], check=True)
    found = dict(contents(ShardReader(path)))
    assert found["part.one/a"] == {"seg.png": b"part.one/a.seg.png", "txt": b"part.one/a.txt"}
    assert found["part.one/sub/a"] == {"txt": b"part.one/sub/a.txt"}
    assert found["b"] == {"jpg": b"b.jpg", "txt": b"b.txt"}
    assert found[LONG[form]] == {"txt": b"long name"}
    assert len(found) == 4
    assert sorted(found.items()) == sorted(plain([path]))


def test_same_samples_give_same_bytes(tmp_path):
    def digests(folder):
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in write(tmp_path / folder, 10, max_count=6)]

    assert digests("one") == digests("two")
    with tarfile.open(tmp_path / "one" / "made-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert [m.name for m in members[:3]] == ["000000.bin", "000000.json", "000000.txt"]


def test_shards_are_cut_by_bytes(tmp_path):
    with ShardWriter(tmp_path / "made-%d.tar", max_bytes=1000) as writer:
        for i in range(5):
            writer.write(str(i), {"bin": b"x" * (2000 if i == 1 else 400)})
    assert [len(ShardReader(path)) for path in writer.shards] == [1, 1, 2, 1]


def test_a_key_is_unique_in_its_shard_only(tmp_path):
    with ShardWriter(tmp_path / "made-%d.tar", max_count=1) as writer:
        writer.write("same", {"txt": "0"})
        writer.write("same", {"txt": "1"})
    assert [sample.text() for sample in ShardReader(tmp_path)] == ["0", "1"]


def test_a_failing_run_leaves_only_complete_shards(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "made-%d.tar", max_count=2) as writer:
            for i in range(3):
                writer.write(str(i), {"txt": "x"})
            assert not (tmp_path / "made-1.tar").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["made-0.tar"]
    assert len(ShardReader(tmp_path)) == 2
    left_over = tmp_path / ".none-0.tar.123.partial"  # of a killed process
    left_over.touch()
    with ShardWriter(tmp_path / "none-%d.tar"):
        pass
    assert not left_over.exists()
    assert not list(tmp_path.glob("none*"))


def test_old_shards_are_never_mixed_with_new_ones(tmp_path):
    write(tmp_path, 10, max_count=2)
    len(ShardReader(tmp_path))
    (tmp_path / "made-other.tar").touch()
    with pytest.raises(ShardError, match=r"made-000000.tar exists already, as one of 5 shards"):
        ShardWriter(tmp_path / "made-%06d.tar")
    write(tmp_path, 3, max_count=2, existing="replace")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made-000000.tar", "made-000001.tar", "made-other.tar"]


@pytest.mark.parametrize(
    ("key", "members", "error"),
    [
        ("a.b", {"txt": ""}, "no dot"),
        ("", {"txt": ""}, "no dot"),
        ("__a__", {"txt": ""}, "__name__"),
        ("__a__/b", {"txt": ""}, "__name__"),
        ("/a", {"txt": ""}, "inside its folder"),
        ("../a", {"txt": ""}, "inside its folder|no dot"),
        ("a/../b", {"txt": ""}, "inside its folder"),
        ("a\0", {"txt": ""}, "no NUL"),
        ("a\udcff", {"txt": ""}, "not Unicode"),
        ("a", {}, "has no members"),
        ("a", {"TXT": ""}, "'TXT' is no lower-case extension"),
        ("a", {".txt": ""}, "extension"),
        ("a", {"": ""}, "extension"),
        ("a", {"a/b": ""}, "extension"),
        ("a", {"_a": ""}, "extension"),
        ("a" * 300, {"txt": ""}, "name is too long"),
        ("0", {"txt": ""}, "key 0 is written twice"),
    ],
)
def test_what_cannot_be_written(tmp_path, key, members, error):
    with ShardWriter(tmp_path / "made-%d.tar") as writer:
        writer.write("0", {"txt": "x"})
        with pytest.raises(ShardError, match=error):
            writer.write(key, members)
        writer.write("1", {"txt": "y"})
    assert [sample.key for sample in ShardReader(tmp_path)] == ["0", "1"]


def test_writer_arguments(tmp_path):
    for pattern in ["made.tar", "made-%d-%d.tar", "made-%s.tar"]:
        with pytest.raises(ValueError, match="must hold one number"):
            ShardWriter(tmp_path / pattern)
    with pytest.raises(ValueError, match="max_count"):
        ShardWriter(tmp_path / "%d.tar", max_count=0)
    with pytest.raises(ValueError, match="existing"):
        ShardWriter(tmp_path / "%d.tar", existing="append")
    with ShardWriter(tmp_path / "100%d.tar") as writer, pytest.raises(TypeError, match=r"a.npy: .* not ndarray"):
        writer.write("a", {"npy": np.zeros(3)})


def test_ways_to_name_shards(tmp_path):
    paths = write(tmp_path / "a", 6, max_count=2)
    for given in [
        tmp_path / "a",
        str(tmp_path / "a" / "made-{000000..000002}.tar"),
        str(tmp_path / "a" / "made-*.tar"),
        paths,
        [str(path) for path in paths],
        iter(paths),
    ]:
        assert [sample.key for sample in ShardReader(given)] == [f"{i:06d}" for i in range(6)]
    assert [sample.key for sample in ShardReader([paths[2], paths[0]])] == ["000004", "000005", "000000", "000001"]
    with pytest.raises(ShardError, match=r"made-000003.tar: cannot open: No such file"):
        ShardReader(str(tmp_path / "a" / "made-{000002..000003}.tar"))
    for nothing in [tmp_path, str(tmp_path / "b-*.tar"), []]:
        with pytest.raises(ShardError, match="no shards"):
            ShardReader(nothing)


def test_index_is_kept_and_rebuilt_when_stale(tmp_path, monkeypatch):
    (path,) = write(tmp_path, 3)
    sidecar = tmp_path / "made-000000.tar.index.safetensors"
    assert len(ShardReader(path)) == 3
    assert sidecar.exists()
    with monkeypatch.context() as patch:
        patch.setattr(index_files, "scan_samples", lambda *_, **__: pytest.fail("the index was not used"))
        assert [sample.text() for sample in ShardReader(path)] == ["text 0", "text 1", "text 2"]
    old = ShardReader(path)
    write(tmp_path, 5, existing="replace")
    assert not sidecar.exists()
    assert len(ShardReader(path)) == 5
    with pytest.raises(ShardError, match="changed since it was indexed"):
        old[0]
    whole = sidecar.read_bytes()
    for broken in [
        b"",
        b"{}",
        bytes(8),
        b"\xff" * 20,
        whole[:100],
        whole[:-1],
        whole.replace(b'"starts"', b'"stairs"'),
    ]:
        sidecar.write_bytes(broken)
        assert [sample.text() for sample in ShardReader(path)] == [f"text {i}" for i in range(5)]
        assert sidecar.read_bytes() == whole
    # The same size and another time of change.
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(ShardReader(path)) == 5
    assert ShardIndex.open(sidecar, "").stamp.version == str(status.st_mtime_ns + 1)


def test_index_that_cannot_be_kept(tmp_path, monkeypatch):
    (path,) = write(tmp_path, 3)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    assert len(ShardReader(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_truncation_is_found_wherever_it_is(tmp_path):
    (path,) = write(tmp_path, 20)
    size = len(path.read_bytes())
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    bad = tmp_path / "cut.tar"
    for length in [1, 511, 512, 513, 1024, size // 2, size // 2 + 100, end - 512, end - 1, end]:
        bad.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ShardError, match=rf"^{bad}: truncated .*byte \d+") as caught:
            ShardReader(bad)
        assert "\n" not in str(caught.value)
    # After one block of zeros nothing is missing.
    good = tmp_path / "good.tar"
    good.write_bytes(path.read_bytes()[: end + 512])
    assert len(ShardReader(good)) == 20


def test_damaged_header_in_the_middle_is_found(tmp_path):
    (path,) = write(tmp_path, 20)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[30].offset
    # webdataset ends there without a word.
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = b"\xff" * 512
    bad = tmp_path / "bad.tar"
    bad.write_bytes(data)
    assert len(plain([bad])) == 10
    with pytest.raises(ShardError, match=f"damaged header at byte {offset}"):
        ShardReader(bad)


def test_other_injuries(tmp_path):
    (path,) = write(tmp_path, 4)
    whole = path.read_bytes()

    def reason(data):
        bad = tmp_path / "bad.tar"
        bad.write_bytes(data)
        with pytest.raises(ShardError) as caught:
            ShardReader(bad)
        return str(caught.value)

    assert "data after the archive's end" in reason(whole + whole)
    assert "truncated or damaged near byte 0" in reason(b"")
    assert "truncated or damaged near byte 0" in reason(b"no tar " * 500)

    def made(*names):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
        return file.getvalue()

    assert "sample a comes again at byte" in reason(made("a.txt", "b.txt", "a.jpg", "a.txt"))
    assert "sample a has the member 'txt' twice" in reason(made("a.txt", "a.TXT"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:bz2") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert "it is compressed with bzip2" in reason(packed.getvalue())


def test_file_cut_after_indexing(tmp_path):
    (path,) = write(tmp_path, 4)
    reader = ShardReader(path)
    status = path.stat()
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(ShardError, match="changed since"):
        reader[3]
    path.unlink()
    with pytest.raises(ShardError, match="cannot read sample 000003: No such file"):
        reader[3]
    assert status.st_size > 600


def test_errors_of_members_name_the_sample(tmp_path):
    with ShardWriter(tmp_path / "%d.tar") as writer:
        writer.write("a", {"json": "{", "txt": b"\xff"})
    sample = ShardReader(tmp_path)[0]
    where = f"{tmp_path / '0.tar'}: sample a"
    for call, error in [
        (sample.json, f"{where}.json: not JSON"),
        (sample.text, f"{where}.txt: not UTF-8"),
        (lambda: sample.text("cls"), f"{where}: no member 'cls'; its members are json, txt"),
    ]:
        with pytest.raises(ShardError) as caught:
            call()
        assert str(caught.value).startswith(error)


def test_names_are_never_paths(tmp_path):
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as tar:
        for name in ["/etc/passwd.txt", "../../escape.txt", "a\\b.txt"]:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    reader = ShardReader(file)
    assert [sample.members for sample in reader] == [{"txt": b"x"}] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar", "evil.tar.index.safetensors"]


def test_threads_share_a_reader(tmp_path):
    write(tmp_path, 40, max_count=7)
    reader = ShardReader(tmp_path)
    right = contents(reader)
    wrong = []

    def work(seed):
        for position in np.random.default_rng(seed).integers(0, 40, 300):
            sample = reader[int(position)]
            if (sample.key, sample.members) != right[position]:
                wrong.append(position)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_names_of_samples_are_known_without_reading_them(tmp_path):
    with ShardWriter(tmp_path / "%06d.tar", max_count=2) as writer:
        for i in range(5):
            writer.write(f"k{i}", {"txt": "x"})
    reader = ShardReader(str(tmp_path / "*.tar"))
    assert [reader.name(i) for i in range(5)] == [(sample.shard, sample.key) for sample in reader]
