"""Indexes are found where they are kept, are small, and are of the shard as it is now or not used."""

import io
import logging
import os
import pickle
import shutil
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
from herdkit.data import index_files, shard_files
from herdkit.data.byte_cache import ByteCache
from herdkit.data.shard_files import LocalFile
from herdkit.data.shard_index import ShardIndex, Stamp, leaves_folder, narrowed
from herdkit.data.shards import ShardError, ShardReader
from safetensors.numpy import load_file


def write(path, samples=30, text="text {}", extra=(), prefix=""):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            for extension, content in [("txt", text.format(i).encode()), ("bin", bytes([i % 256]) * 300), *extra]:
                member = tarfile.TarInfo(f"{prefix}{i:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def sidecar(path):
    return path.with_name(path.name + ".index.safetensors")


def set_time(path, nanoseconds):
    os.utime(path, ns=(nanoseconds, nanoseconds))


@pytest.fixture
def scans(monkeypatch):
    """The shards that were scanned."""
    scanned = []
    scan = index_files.scan_samples

    def note(source, shard, *rest, **named):
        scanned.append(shard)
        return scan(source, shard, *rest, **named)

    monkeypatch.setattr(index_files, "scan_samples", note)
    return scanned


def texts(path, **options):
    return [sample.text() for sample in ShardReader(path, **options)]


RIGHT = [f"text {i}" for i in range(30)]


def test_touched_and_copied(tmp_path, scans, caplog):
    """Another time of change alone: the headers are read again, once."""
    caplog.set_level(logging.INFO, "herdkit")
    path = write(tmp_path / "a.tar")
    assert texts(path) == texts(path) == RIGHT
    assert len(scans) == 1
    set_time(path, 10**18)
    assert texts(path) == texts(path) == RIGHT
    assert len(scans) == 2
    assert "another time of change" in caplog.text
    (tmp_path / "copy").mkdir()
    for file in (path, sidecar(path)):
        shutil.copy(file, tmp_path / "copy" / file.name)
    assert texts(tmp_path / "copy") == texts(tmp_path / "copy") == RIGHT
    assert len(scans) == 3
    (tmp_path / "exact").mkdir()
    for file in (path, sidecar(path)):
        shutil.copy2(file, tmp_path / "exact" / file.name)
    assert texts(tmp_path / "exact") == RIGHT
    assert len(scans) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_index_of_another_shard_is_not_used(tmp_path, scans, caplog):
    """Even if size and time of change are the same, as after a rename or `rsync --times`."""
    one, two = write(tmp_path / "1.tar"), write(tmp_path / "2.tar", prefix="x")
    assert one.stat().st_size == two.stat().st_size
    for path in (one, two):
        set_time(path, 10**18)
        texts(path)
    before = sidecar(one).read_bytes()
    one.rename(tmp_path / "0.tar")
    two.rename(one)
    assert [sample.key for sample in ShardReader(one)] == [f"x{i:04d}" for i in range(30)]
    assert scans[2:] == [str(one)]
    assert f"{sidecar(one)}: is of another shard" in caplog.text
    assert sidecar(one).read_bytes() != before
    caplog.clear()
    write(one, 50)
    assert len(ShardReader(one)) == 50
    assert f"{sidecar(one)}: is of a shard of" in caplog.text
    caplog.clear()
    sidecar(one).write_bytes(b"something else, of another program")
    assert len(ShardReader(one)) == 50
    assert f"{sidecar(one)}: is no index of a shard" in caplog.text


def test_a_small_change_of_the_same_length(tmp_path):
    """Which leaves the size, and the pieces of the fingerprint, as they were."""
    path = write(tmp_path / "a.tar", 400)
    with tarfile.open(path) as tar:
        member = tar.getmember("0123.txt")
    old = ShardReader(path)
    first = index_files.fingerprint(LocalFile(path))
    changed = bytearray(path.read_bytes())
    member.size += 5
    changed[member.offset : member.offset_data] = member.tobuf(tarfile.USTAR_FORMAT)
    changed[member.offset_data : member.offset_data + member.size] = b"text of 123!!"[: member.size]
    changed_at = path.stat().st_mtime_ns
    path.write_bytes(changed)
    assert index_files.fingerprint(LocalFile(path)) == first
    set_time(path, changed_at + 1)
    assert ShardReader(path)[123].text() == "text of 123!!"
    with pytest.raises(ShardError, match="changed since it was indexed"):
        old[123]
    # Should the time be the same as well, it is the read that finds out.
    sidecar(path).unlink()
    set_time(path, changed_at)
    good = ShardReader(path)
    member.size -= 5
    changed[member.offset : member.offset_data] = member.tobuf(tarfile.USTAR_FORMAT)
    with path.open("r+b") as file:
        file.write(changed)
    set_time(path, changed_at)
    for reader in (good, ShardReader(path)):
        assert reader[122].text() == "text 122"
        with pytest.raises(ShardError, match=rf"{path}: changed since it was indexed, at byte {member.offset_data}"):
            reader[123]


def test_index_folder(tmp_path, scans):
    """For data that cannot be written to. An index is found by what the shard holds, wherever it is moved to."""
    folder = tmp_path / "indexes" / "new"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0.tar", prefix=name)
    both = [tmp_path / "a", tmp_path / "b"]
    assert len(ShardReader(both, index_folder=folder)) == 60
    assert len(scans) == len(list(folder.iterdir())) == 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["0.tar"]
    (tmp_path / "a").rename(tmp_path / "moved")
    reader = ShardReader([tmp_path / "moved", tmp_path / "b"], index_folder=folder)
    assert (reader[0].key, reader[30].key) == ("a0000", "b0000")
    assert len(scans) == 2
    write(tmp_path / "b" / "0.tar", 31)
    assert len(ShardReader(tmp_path / "b", index_folder=folder)) == 31
    assert len(scans) == 3


def test_a_folder_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    path = write(tmp_path / "a.tar")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    assert texts(path) == RIGHT
    assert f"{sidecar(path)}: cannot be written (Permission denied)" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


def test_an_index_is_there_completely_or_not_at_all(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar")
    write_bytes = Path.write_bytes

    def fill_the_disk(self, content):
        write_bytes(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_the_disk)
        assert texts(path) == RIGHT
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]
    seen = []
    monkeypatch.setattr(Path, "write_bytes", lambda *rest: seen.append(sidecar(path).exists()) or write_bytes(*rest))
    assert texts(path) == RIGHT
    assert seen == [False]
    set_time(path, 10**18)
    before = sidecar(path).stat().st_ino
    assert texts(path) == RIGHT
    assert sidecar(path).stat().st_ino != before


def test_others_can_read_the_file(tmp_path):
    path = write(tmp_path / "a.tar")
    ShardReader(path)
    arrays = load_file(sidecar(path))
    assert arrays["starts"].tolist() == list(range(0, 61, 2))
    assert arrays["keys"].tobytes().decode() == "".join(f"{i:04d}" for i in range(30))
    with tarfile.open(path) as tar:
        assert (arrays["offsets"].astype(int) * 512).tolist() == [member.offset_data for member in tar]


def test_large_indexes_are_mapped(tmp_path):
    """To open one takes neither its arrays' time nor their memory, and an element is read at its place."""
    samples = 1_000_000
    keys = np.strings.add(b"k", np.arange(samples).astype("S7"))
    places = np.arange(samples, dtype=np.uint64)
    index = ShardIndex(
        stamp=Stamp(1, "2", "3"),
        compression="",
        extension_names=["txt"],
        unit=512,
        starts=narrowed(np.arange(samples + 1)),
        key_starts=narrowed(np.concatenate([[0], np.cumsum(np.strings.str_len(keys))])),
        keys=np.frombuffer(b"".join(keys.tolist()), np.uint8),
        offsets=narrowed(places * 2),
        sizes=narrowed(places % 500),
        headers=np.zeros(samples, np.uint32),
        extensions=narrowed(places * 0),
    )
    path = tmp_path / "big"
    path.write_bytes(index.to_bytes())
    assert path.stat().st_size < 32 * samples
    del index

    def own_memory():
        """Of this process alone, unlike the pages of the file."""
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    before, start = own_memory(), time.perf_counter()
    index = ShardIndex.open(path, "shard")
    assert len(index) == samples
    assert index.key(987_654) == "k987654"
    assert index.members(987_654) == (["txt"], [987_654 * 1024], [154], [0])
    assert time.perf_counter() - start < 0.1
    assert own_memory() - before < 1 << 20


def test_names(tmp_path):
    """Not UTF-8, with line feeds, or dangerous as paths: all of them are keys."""
    path = tmp_path / "a.tar"
    names = ["caf\udce9.txt", "a\nb.txt", "\x1b[31m.txt", "/abs/olute.txt", "../up.txt", "d/../../e.txt", "C:\\f.txt"]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    before = sorted(tmp_path.parent.rglob("*"))
    reader = ShardReader(path, index_folder=tmp_path / "indexes")
    assert [sample.key for sample in reader] == [name[:-4] for name in names]
    index = ShardIndex.open(next((tmp_path / "indexes").iterdir()), "a")
    assert index.unsafe == [name[:-4] for name in names[3:]]
    assert [sample.leaves_folder for sample in reader] == [False] * 3 + [True] * 4
    assert len(sorted(tmp_path.parent.rglob("*"))) == len(before) + 2
    for name in ("a/b", "a..b/c", ".a", "a b"):
        assert not leaves_folder(name)
    for name in ("/a", "..", "a/..", "..\\a", "a\\..\\b", "c:d", "\\a", "a\0b"):
        assert leaves_folder(name)


def test_one_read_for_neighbours(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", extra=[("json", b"{}")])
    apart = tmp_path / "b.tar"
    with tarfile.open(apart, "w") as tar:
        for extension in ("a", "b", "c"):
            for i in range(10):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = 9000
                tar.addfile(member, io.BytesIO(f"{i}{extension}".encode() * 4500))
    readers = [ShardReader(path), ShardReader(apart)]
    reads = []
    read = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda *arguments: reads.append(arguments[1:]) or read(*arguments))
    assert list(readers[0][7].members) == ["txt", "bin", "json"]
    assert len(reads) == 1
    assert readers[1][4].members == {extension: f"4{extension}".encode() * 4500 for extension in "abc"}
    assert len(reads) == 4
    assert sum(length for _, length in reads[1:]) == 3 * 9512


def test_few_files_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_opened", lru_cache(maxsize=4)(shard_files._opened.__wrapped__))
    for i in range(12):
        write(tmp_path / f"{i:02d}.tar", 3)
    reader = ShardReader(tmp_path)

    def opened():
        links = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
        return sum(link.startswith(str(tmp_path)) and link.endswith(".tar") for link in links)

    for _ in range(3):
        assert len(list(reader)) == 36
        assert opened() == 4
    # While others close files that one reads from.
    with ThreadPoolExecutor(8) as threads:
        order = np.random.default_rng(0).integers(0, 36, 2000).tolist()
        keys = list(threads.map(lambda i: reader[i].text(), order))
    assert keys == [f"text {i % 3}" for i in order]
    assert opened() == 4


def test_processes(tmp_path):
    """A reader works after a fork, also in the parent, and is pickled as its settings."""
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar", 400)
    reader = ShardReader(tmp_path, index_folder=tmp_path / "indexes")
    right = [sample.text() for sample in reader]
    with get_context("fork").Pool(2) as pool:
        mine = pool.imap(_text, [(reader, i) for i in range(0, 430, 7)])
        theirs = [reader[i].text() for i in range(430)]
        assert list(mine) == right[::7]
    assert theirs == right
    content = pickle.dumps(reader)
    assert len(content) < 2000
    assert [sample.text() for sample in pickle.loads(content)] == right


def _text(job):
    reader, i = job
    return reader[i].text()


def test_gzip(tmp_path, caplog):
    plain = write(tmp_path / "plain.tar", 100)
    for name in ("a.tar.gz", "b.tgz"):
        with plain.open("rb") as file:
            content = subprocess.run(["gzip", "-c"], stdin=file, check=True, capture_output=True).stdout
        (tmp_path / name).write_bytes(content)
    # Several streams one after the other are one, as pigz and bgzip write them.
    half = len(plain.read_bytes()) // 2
    parts = [subprocess.run(["gzip"], input=part, check=True, capture_output=True).stdout
             for part in (plain.read_bytes()[:half], plain.read_bytes()[half:])]  # fmt: skip
    (tmp_path / "c.tar").write_bytes(b"".join(parts))
    plain.unlink()
    cache = ByteCache(tmp_path / "cache", 10 << 20)
    reader = ShardReader(tmp_path, cache=cache)
    assert len(reader) == 300
    messages = [record.message for record in caplog.records if "gzip" in record.message]
    assert len(messages) == 1
    assert messages[0].startswith("3 of 3 shards are compressed with gzip")
    order = np.random.default_rng(0).permutation(300)
    assert [reader[int(i)].text() for i in order] == [f"text {i % 100}" for i in order]
    assert (reader.paths[0], reader[0].shard) == (tmp_path / "a.tar.gz", str(tmp_path / "a.tar.gz"))
    # What the cache has dropped is decompressed anew.
    small = ByteCache(tmp_path / "small", 400_000)
    reader = ShardReader(tmp_path, cache=small)
    for i in (0, 150, 299, 1):
        assert reader[i].text() == f"text {i % 100}"
    tiny = ByteCache(tmp_path / "tiny", 1000)
    with pytest.raises(ShardError, match=r"cannot read sample 0000: the cache of 1000 bytes in .*tiny has no room"):
        ShardReader(tmp_path, cache=tiny)[0]
    with pytest.raises(ShardError, match=r"a.tar.gz: cannot open: the cache of 1000 bytes"):
        ShardReader(tmp_path / "a.tar.gz", cache=tiny, index_folder=tmp_path / "none")


def test_damaged_gzip(tmp_path):
    plain = write(tmp_path / "plain.tar", 100, text="text {}" + "x" * 1000)
    path = tmp_path / "a.tar.gz"
    whole = subprocess.run(["gzip"], input=plain.read_bytes(), check=True, capture_output=True).stdout
    plain.unlink()
    cache = ByteCache(tmp_path / "cache")
    for content in (
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + b"\xff" * 100 + whole[len(whole) // 2 + 100 :],
    ):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=rf"{path}: "):
            ShardReader(path, cache=cache)
        for _ in range(2):
            reader = ShardReader(path, cache=cache, on_fault="skip")
            assert 0 < len(reader) < 100
            assert [sample.text()[:7].strip("x") for sample in reader] == [f"text {i}"[:7] for i in range(len(reader))]
            assert any("damaged gzip compression after byte" in fault.reason for fault in reader.faults)
    # A wrong sum at the end says that something is wrong, not what.
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    reader = ShardReader(path, cache=cache, on_fault="skip")
    assert len(reader) == 100
    assert "CRC" in reader.faults[0].reason


def test_plain_and_compressed_in_one_folder(tmp_path):
    write(tmp_path / "a.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ShardError, match=r"a plain and compressed; name those"):
        ShardReader(tmp_path)


def test_patterns_in_folders(tmp_path):
    for name in ("x/a", "y/a", "y/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.tar", 2, prefix=name.replace("/", "-"))
    assert [sample.key for sample in ShardReader(str(tmp_path / "*" / "a.tar"))][::2] == ["x-a0000", "y-a0000"]
    assert len(ShardReader(str(tmp_path / "{x,y}" / "*.tar"))) == 6
    assert len(ShardReader(f"file://{tmp_path}/y/b.tar")) == 2
