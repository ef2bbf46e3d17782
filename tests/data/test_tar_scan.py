"""The scan of headers finds what tarfile finds, in tars that other programs wrote."""

import io
import random
import subprocess
import tarfile
import time

import pytest
import webdataset
from herdkit.data import tar_scan
from herdkit.data.shard_files import LocalFile
from herdkit.data.tar_scan import Damage, TarScan


class Content:
    def __init__(self, content):
        self.content, self.size = content, len(content)

    def read(self, offset, length):
        return self.content[offset : offset + length]


def scanned(source, smallest_read=4096):
    found = []
    for event in TarScan(source, smallest_read):
        assert not isinstance(event, Damage), event
        found += zip(event.names, event.offsets, event.sizes, strict=True)
    return found


def by_tarfile(path):
    with tarfile.open(path, "r:") as tar:
        return [(m.name.encode("utf-8", "surrogateescape"), m.offset_data, m.size) for m in tar if m.isreg()]


NAMES = [
    "a.txt",
    "a.seg.png",
    "deep/er/b.txt",
    "with space.txt",
    "no extension",
    "n" * 99,
    "e" * 96 + ".txt",
    "empty.txt",
    *(f"many/{i:03d}.txt" for i in range(60)),
]
LONGER = ["p" * 90 + "/" + "q" * 90 + ".txt", "ü" * 40 + ".txt", "x/" * 30 + "y" * 60 + ".txt"]
LONGEST = ["l" * 250 + ".txt", "d/" * 200 + "k.txt", "ü" * 120 + ".txt"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for i, name in enumerate([*NAMES, *LONGER, *LONGEST]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (0 if "empty" in name else [1, 511, 512, 513, 3000][i % 5]))
    (folder / "link.txt").symlink_to("a.txt")
    (folder / "z.hard.txt").hardlink_to(folder / "a.txt")
    return folder


FORMATS = ["v7", "ustar", "oldgnu", "gnu", "posix"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("smallest_read", [512, 4096, 1 << 20])
def test_what_tar_writes(tree, tmp_path, form, smallest_read):
    names = NAMES + (LONGER if form != "v7" else []) + (LONGEST if form in ("oldgnu", "gnu", "posix") else [])
    path = tmp_path / "made.tar"
    extra = ["z.hard.txt", "link.txt", "deep"]
    subprocess.run(["tar", f"--format={form}", "-cf", path, "-C", tree, *names, *extra], check=True)
    found = scanned(LocalFile(path), smallest_read)
    assert found == by_tarfile(path)
    assert {name.decode() for name, _, _ in found} == {*names}


def test_times_of_gnu_tar_are_no_names(tree, tmp_path):
    """An incremental archive keeps times where others keep the start of a long name; there tarfile is wrong."""
    path = tmp_path / "made.tar"
    state = f"--listed-incremental={tmp_path / 'state'}"
    subprocess.run(["tar", "--format=gnu", state, "-cf", path, "-C", tree, "deep"], check=True)
    listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True).stdout.split()
    assert [name.decode() for name, _, _ in scanned(LocalFile(path))] == [n for n in listed if not n.endswith("/")]
    assert scanned(LocalFile(path))[0][0] == b"deep/er/b.txt"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes(tmp_path, form, monkeypatch):
    """At random, with small windows so that headers lie across their ends."""
    monkeypatch.setattr(tar_scan, "_WINDOW", 20_000)
    for seed in range(12):
        draw = random.Random(seed)
        path = tmp_path / f"{seed}.tar"
        headers = {"comment": "of all"} if form == tarfile.PAX_FORMAT and seed % 3 == 0 else {}
        with tarfile.open(path, "w", format=form, pax_headers=headers) as tar:
            for i in range(draw.choice([1, 20, 150])):
                member = tarfile.TarInfo(f"{'d/' * draw.choice([0, 0, 0, 60])}{i}.{draw.choice(['txt', 'Ünï', 'a.b'])}")
                if form != tarfile.USTAR_FORMAT and draw.random() < 0.05:
                    member.name = "n" * draw.randint(101, 700) + member.name
                member.size = draw.choice([0, 1, 512, draw.randint(0, 5000), 60_000 if draw.random() < 0.1 else 7])
                member.mtime = draw.choice([0, time.time()]) if form == tarfile.PAX_FORMAT else 10**9
                member.uid = draw.choice([0, 1000, 1 << 20])
                if form != tarfile.USTAR_FORMAT and draw.random() < 0.02:
                    member.uid = 1 << 33
                if draw.random() < 0.05:
                    member.type, member.linkname, member.size = draw.choice([b"1", b"2"]), "elsewhere", 0
                elif draw.random() < 0.05:
                    member.type, member.size = draw.choice([b"5", b"6", b"3"]), 0
                tar.addfile(member, io.BytesIO(bytes(draw.randrange(256) for _ in range(97)) * (member.size // 97 + 1)))
        assert scanned(LocalFile(path), draw.choice([512, 2048, 30_000])) == by_tarfile(path), seed


def test_what_webdataset_writes(tmp_path):
    """With a pax header for the time of each member."""
    path = tmp_path / "made.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(300):
            text = " path=nowhere " if i % 7 == 0 else "y"
            writer.write({"__key__": f"part/{i:06d}", "txt": text, "bin": b" size=" * i, "json": {"i": i}})
    assert scanned(LocalFile(path)) == by_tarfile(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_more_than_8_gib(tmp_path, form):
    """Sizes in base 256 and in pax records, and offsets beyond 32 bits; the file has a hole."""
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        for name, size in [("a.bin", 9 << 30), ("b.txt", 3), ("c.bin", 10 << 30), ("d.txt", 4)]:
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf(form))
            file.seek((size + 511) // 512 * 512, 1)
        file.write(bytes(1024))
    found = scanned(LocalFile(path))
    assert found == by_tarfile(path)
    assert [size for _, _, size in found] == [9 << 30, 3, 10 << 30, 4]


def pax(records, kind=b"x"):
    content = b""
    for keyword, value in records.items():
        record = f" {keyword}={value}\n".encode()
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length += 1
        content += str(length).encode() + record
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = kind, len(content)
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def plain(name, content=b"abc", size=None, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content) if size is None else size
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


END = bytes(1024)


@pytest.mark.parametrize(
    "content",
    [
        pax({"path": "new/name.txt"}) + plain("old.txt"),
        pax({"path": "name/"}) + plain("old.txt"),
        pax({"size": "700"}) + plain("a.txt", b"x" * 700, size=0) + plain("b.txt"),
        pax({"size": "700", "path": "c.txt", "linkpath": "d"}) + plain("a.txt", b"x" * 700, size=5) + plain("b.txt"),
        pax({"comment": " path=no"}, b"g") + plain("a.txt") + plain("b.txt"),
        pax({"path": "all.txt"}, b"g") + plain("a.txt") + pax({"path": "own.txt"}) + plain("b.txt") + plain("c.txt"),
        pax({"mtime": "1.5"}, b"g") + b"".join(plain(f"{i}.txt") for i in range(40)),
        pax({"SCHILY.xattr.user.x": "\n path=no\n"}) + plain("a.txt"),
        pax({"path": "ü" * 300 + ".txt"}, b"X") + plain("a.txt"),
        plain("dir/", type=b"0") + plain("b.txt"),
        plain("dir/", b"", type=b"\0") + plain("b.txt", type=b"\0"),
        plain("link.txt", b"", type=b"1", linkname="a.txt") + plain("b.txt"),
        plain("other.txt", b"data", type=b"Z") + plain("b.txt", type=b"7"),
        b"",
    ],
)
def test_records_and_kinds(tmp_path, content):
    path = tmp_path / "made.tar"
    path.write_bytes(content + END)
    assert scanned(LocalFile(path)) == by_tarfile(path)


def edited(header, edits, signed=False):
    """A header with other bytes and the sum that they need."""
    header = bytearray(header)
    for at, value in edits.items():
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in header)
    header[148:156] = b"%06o\0 " % total
    return bytes(header)


@pytest.mark.parametrize(
    ("edits", "signed"),
    [
        ({0: b"\xff\xfe\xfd.txt"}, True),
        ({0: b"\xff\xfe\xfd.txt"}, False),
        ({124: b"\x80" + bytes(10) + b"\x03"}, False),
        ({124: b"          3\0"}, False),
        ({124: b"3\0junk\0\0\0\0\0\0"}, False),
        ({124: b"000000000003"}, False),
        ({124: b"00000000003 "}, False),
        ({0: b"a.txt\0rubbish"}, False),
        ({156: b"\0"}, False),
        ({345: b"front/part\0"}, False),
    ],
)
def test_odd_headers(tmp_path, edits, signed):
    content = edited(plain("a.txt")[:512], edits, signed) + b"abc" + bytes(509)
    path = tmp_path / "made.tar"
    path.write_bytes(b"".join(plain(f"{i}.txt") for i in range(20)) + content + plain("z.txt") + END)
    assert scanned(LocalFile(path)) == by_tarfile(path)


def test_data_far_apart_are_not_read(tmp_path):
    path = tmp_path / "made.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(20):
            for extension, size in [("json", 100), ("jpg", 200_000)]:
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    source = Content(path.read_bytes())
    lengths = []
    read = source.read
    source.read = lambda offset, length: lengths.append(len(read(offset, length))) or read(offset, length)
    assert len(scanned(source)) == 40
    assert sum(lengths) < 20 * 20_000
