"""What is damaged is recorded and left out; everything else is read, and nothing is lost without a word."""

import io
import random
import subprocess
import tarfile

import pytest
from herdkit.data.faults import Fault, ShardError
from herdkit.data.shards import ShardReader


def made(samples=20, extensions=("json", "png"), form=tarfile.USTAR_FORMAT, name="{:05d}", size=700, end=True):
    """A tar's bytes, its contents {key: {extension: bytes}} and its members [(name, header, data, size)]."""
    file, truth = io.BytesIO(), {}
    draw = random.Random(samples)
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i in range(samples):
            key = name.format(i)
            truth[key] = {extension: draw.randbytes(size + 10 * i) for extension in extensions}
            for extension, content in truth[key].items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        members = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
    content = bytearray(file.getvalue())
    if not end:
        del content[members[-1][2] + -(-members[-1][3] // 512) * 512 :]
    return content, truth, members


@pytest.fixture
def read(tmp_path):
    """Reads what is good: {key: members} and the faults, twice, the second time through the index that was kept."""

    def read(content):
        path = tmp_path / "shard.tar"
        path.write_bytes(content)
        reader = ShardReader(path, on_fault="skip")
        again = ShardReader(path, on_fault="skip")
        found = {sample.key: sample.members for sample in reader}
        assert len(found) == len(reader) == len(again)
        assert (again.faults, [sample.key for sample in again]) == (reader.faults, list(found))
        if reader.faults:
            with pytest.raises(ShardError) as caught:
                ShardReader(path)
            assert str(caught.value).startswith(str(reader.faults[0]))
        else:
            assert len(ShardReader(path)) == len(found)
        return found, reader.faults

    return read


def without(truth, *keys):
    return {key: members for key, members in truth.items() if key not in keys}


def test_nothing_wrong(read):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content, truth, _ = made(form=form)
        assert read(content) == (truth, [])
    assert read(bytes(10240)) == ({}, [])


@pytest.mark.parametrize("number", [0, 1, 13, 20, 39])
def test_a_header_with_a_wrong_byte(read, number):
    """One fault, which names the sample, since the name can still be read."""
    content, truth, members = made()
    name, header, *_ = members[number]
    content[header + 110] ^= 4
    found, faults = read(content)
    key, extension = name.split(".")
    assert found == without(truth, key)
    (fault,) = faults
    assert (fault.offset, fault.key, fault.member) == (header, key, extension)
    assert f"damaged header at byte {header}, where one can still read {name}" in fault.reason


@pytest.mark.parametrize("number", [0, 1, 13, 20, 39])
@pytest.mark.parametrize("filling", [b"\xff", b"\x5a"])
def test_a_header_that_is_gone(read, number, filling):
    content, truth, members = made()
    name, header, *_ = members[number]
    content[header : header + 512] = filling * 512
    found, faults = read(content)
    key = name.split(".")[0]
    assert found == without(truth, key)
    assert [fault.key for fault in faults] == [None, key]
    following = members[number + 1][1] if number < 39 else len(content)
    assert (faults[0].offset, faults[0].skipped) == (header, following - header)
    assert "left out" in faults[1].reason


def test_a_header_of_zeros(read):
    """Like the end of the archive, but that there are data behind it."""
    content, truth, members = made()
    _, header, *_ = members[13]
    content[header : header + 512] = bytes(512)
    found, faults = read(content)
    assert found == without(truth, "00006")
    assert "data after the archive's end" in faults[0].reason
    assert (faults[0].offset, faults[0].skipped) == (header, members[14][1] - header)
    assert [fault.key for fault in faults] == [None, "00006"]


def test_a_wrong_size_does_not_jump_over_good_samples(read):
    content, truth, members = made(200, size=0)
    _, header, *_ = members[100]
    # To another header, a hundred members on.
    content[header + 124 : header + 135] = b"%011o" % (members[200][1] - header - 512)
    found, faults = read(content)
    assert found == without(truth, "00050")
    assert {fault.key for fault in faults} == {"00050"}


@pytest.mark.parametrize("length", [1, 100, 512, 1024, 5000])
def test_bytes_between_members(read, length):
    content, truth, members = made()
    at = members[20][1]
    content[at:at] = b"\xa5" * length
    found, faults = read(content)
    assert found == truth
    (fault,) = faults
    assert (fault.offset, fault.key, fault.skipped) == (at, None, length)


@pytest.mark.parametrize("length", [1, 100, 512])
def test_bytes_lost_inside_a_member(read, length):
    """The header that follows lies inside what the member claims for its data."""
    content, truth, members = made()
    name, _, data, _ = members[21]
    del content[data + 5 : data + 5 + length]
    found, faults = read(content)
    assert found == without(truth, "00010")
    (fault,) = faults
    assert (fault.key, fault.member) == ("00010", "png")
    assert f"bytes are missing before byte {members[22][1] - length}, inside {name}" in fault.reason


def test_every_truncation(read):
    content, truth, members = made(6, size=100)
    end = members[-1][2] + 512
    for length in [1, 511, 512, 600, 1024, 1025, *range(2000, end, 301), end - 1, end]:
        found, faults = read(content[:length])
        whole = [
            name.split(".")[0] for name, _, data, size in members if name.endswith("png") and data + size <= length
        ]
        assert found == {key: truth[key] for key in whole} or (len(whole) == 1 and found == {}), length
        assert "truncated" in faults[0].reason
        assert faults[0].offset == length


def test_a_missing_end(read):
    content, truth, _ = made(end=False)
    found, faults = read(content)
    assert found == truth
    (fault,) = faults
    assert "the mark of the archive's end is missing" in fault.reason


def test_a_file_that_was_not_written_to_its_end(read):
    content, truth, members = made()
    at = members[30][1]
    content[at:] = bytes(3 << 20)
    found, faults = read(content)
    assert found == {key: truth[key] for key in list(truth)[:15]}
    (fault,) = faults
    assert fault.reason.startswith(f"nothing but zeros from byte {at} to the end")
    assert (fault.offset, fault.skipped) == (at, 3 << 20)


def test_joined_archives(read):
    first, truth, _ = made(10)
    second, more, _ = made(10, name="more-{:02d}")
    found, faults = read(first + second)
    assert found == {**truth, **more}
    (fault,) = faults
    assert f"data after the archive's end at byte {len(first)}" in fault.reason
    found, faults = read(first + first)
    assert found == truth
    assert [fault.key for fault in faults] == [None, *truth]
    assert "comes again at byte" in faults[1].reason
    # Cut anywhere and continued by a whole one.
    for length in [3000, 5000, 5120, 7168, 9999]:
        found, faults = read(first[:length] + second)
        assert {key: found[key] for key in more} == more
        assert all(members == truth[key] for key, members in found.items() if key not in more)
        assert faults


def test_keys_and_members_that_come_again(read):
    def tar(*names):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i, name in enumerate(names):
                member = tarfile.TarInfo(name)
                member.size = 2
                tar.addfile(member, io.BytesIO(b"%02d" % i))
        return file.getvalue()

    found, faults = read(tar("a.txt", "a.jpg", "b.txt", "a.txt", "a.cls", "c.txt"))
    assert found == {"a": {"txt": b"00", "jpg": b"01"}, "b": {"txt": b"02"}, "c": {"txt": b"05"}}
    (fault,) = faults
    assert (fault.key, fault.offset) == ("a", 3 * 1024)
    assert "comes again at byte 3072" in fault.reason
    found, faults = read(tar("a.txt", "b.txt", "b.TXT", "b.jpg", "c.txt"))
    assert found == {"a": {"txt": b"00"}, "c": {"txt": b"04"}}
    assert [(fault.key, fault.member, fault.offset) for fault in faults] == [("b", "txt", 2048)]
    # The members of a sample need not be neighbours.
    found, faults = read(tar("a.txt", "b.txt", "c.txt", "c.jpg", "a.jpg", "b.jpg"))
    assert faults == []
    assert list(found) == ["a", "b", "c"]
    assert found["b"] == {"txt": b"01", "jpg": b"05"}


def test_damage_where_members_are_not_neighbours(read):
    """Then any sample may lack the members that were lost."""
    file, truth = io.BytesIO(), {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for extension in ("txt", "jpg"):
            for i in range(10):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = 3
                tar.addfile(member, io.BytesIO(b"%03d" % i))
                truth.setdefault(str(i), {})[extension] = b"%03d" % i
    content = bytearray(file.getvalue())
    content[15 * 1024 : 15 * 1024 + 512] = b"\xff" * 512
    found, faults = read(content)
    assert found == without(truth, "5")
    assert [fault.key for fault in faults] == [None, "5"]


def test_sparse_members(read, tmp_path):
    with (tmp_path / "b.bin").open("wb") as file:
        for _ in range(30):
            file.seek(100_000, 1)
            file.write(b"data")
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    for form in (["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))):
        path = tmp_path / "sparse.tar"
        names = ["a.txt", "b.txt", "b.bin", "c.txt"]
        subprocess.run(["tar", "-S", *form, "-cf", path, "-C", tmp_path, *names], check=True)
        found, faults = read(path.read_bytes())
        assert found == {"a": {"txt": b"a.txt"}, "c": {"txt": b"c.txt"}}
        (fault,) = faults
        assert (fault.key, fault.member) == ("b", "bin")
        assert "sparse" in fault.reason


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_lost_long_name_makes_no_other_sample(read, form):
    """Behind the damage stands a header that holds but the start of the name."""
    content, truth, members = made(10, form=form, name="long/" * 30 + "{:05d}")
    for number in (6, 7):
        broken = bytearray(content)
        header = members[number][1]
        broken[header : header + 512] = b"\xff" * 512
        found, faults = read(broken)
        assert found == without(truth, members[6][0].split(".")[0])
        assert all(fault.reason for fault in faults)
    # The only long name of its shard.
    content, truth, members = made(1, form=form, name="only-{}", extensions=("png" * 50,))
    other, more, _ = made(5, form=form, extensions=("png",))
    content[members[0][1] : members[0][1] + 512] = b"\xff" * 512
    content = content[: members[0][2] + 1024] + other
    found, faults = read(content)
    assert found == more
    assert "may be but a part of a name" in faults[1].reason


def test_damaged_pax_headers(read):
    content, truth, members = made(10, form=tarfile.PAX_FORMAT, name="long/" * 30 + "{:05d}")
    records = members[6][1] + 512
    content[records : records + 3] = b"abc"
    found, faults = read(content)
    key = members[6][0].split(".")[0]
    assert found == without(truth, key)
    assert "has a damaged pax header" in faults[0].reason
    # What claims to be larger than the memory is not read.
    content, truth, members = made(10, form=tarfile.GNU_FORMAT, name="long/" * 30 + "{:05d}")
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = b"L", 1 << 40
    content[members[6][1] : members[6][1] + 512] = huge.tobuf(tarfile.GNU_FORMAT)
    found, faults = read(content)
    assert found == without(truth, members[6][0].split(".")[0])


def test_archives_as_members(read):
    """Their headers are data, also where the shard is damaged."""
    inner = bytes(made(3, name="inner-{}")[0])
    file, truth = io.BytesIO(), {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(10):
            truth[str(i)] = {"json": b"{}", "tar": inner}
            for extension, content in truth[str(i)].items():
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content = file.getvalue()
    assert read(content) == (truth, [])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    for number in (8, 9):
        broken = bytearray(content)
        broken[members[number].offset + 110] ^= 4
        found, faults = read(broken)
        assert found == without(truth, "4")
        assert [fault.key for fault in faults] == ["4"]


def test_what_is_no_tar(read):
    for content in (b"", b"no tar " * 500, b"\xff" * 5000):
        found, (fault,) = read(content)
        assert found == {}
        assert fault.reason.startswith("truncated or damaged near byte 0")


def test_faults_name_their_shard(tmp_path):
    content, _, members = made(3)
    for name in ("one.tar", "two.tar"):
        (tmp_path / name).write_bytes(content)
    content[members[2][1] + 110] ^= 4
    (tmp_path / "two.tar").write_bytes(content)
    reader = ShardReader(tmp_path, on_fault="skip")
    assert len(reader) == 5
    (fault,) = reader.faults
    assert isinstance(fault, Fault)
    assert fault.shard == str(tmp_path / "two.tar")
    assert str(fault).startswith(f"{tmp_path / 'two.tar'}: damaged header at byte")
    with pytest.raises(ValueError, match="on_fault"):
        ShardReader(tmp_path, on_fault="ignore")


INJURIES = ["fill", "flip", "insert", "cut", "zero"]


@pytest.mark.parametrize("seed", range(60))
def test_at_random(read, seed):
    """Of any injury to headers and to what is between members: no wrong sample, none lost without a word."""
    draw = random.Random(seed)
    form = draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    name = draw.choice(["{:05d}", "{:05d}", "folder/" * 20 + "{:05d}"])
    content, truth, members = made(draw.choice([5, 40, 120]), form=form, name=name, size=draw.choice([0, 300, 4000]))
    for injury in draw.choices(INJURIES, k=draw.choice([1, 1, 2])):
        _, header, data, size = draw.choice(members)
        if injury == "fill":
            content[header:data] = draw.randbytes(data - header)
        elif injury == "flip":
            content[data - 512 + draw.randrange(345)] ^= 1 << draw.randrange(8)
        elif injury == "zero":
            content[data - 512 : data] = bytes(512)
        elif injury == "insert":
            content[header:header] = draw.randbytes(draw.choice([1, 512, 3000]))
            break  # the places of what follows are others now
        else:
            del content[draw.randrange(header, data + size + 1) :]
            break
    found, faults = read(content)
    for key, sample in found.items():
        assert sample == truth[key]
    assert faults
    lost = truth.keys() - found.keys() - {fault.key for fault in faults}
    assert not lost or any(fault.skipped or "truncated" in fault.reason for fault in faults)
