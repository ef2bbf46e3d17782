import io
import json
import tarfile

import pytest
from herdkit.cli import main


def write(path, names):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        write(folder / f"{i}.tar", [f"{i}{j}.{kind}" for j in range(20) for kind in ("json", "txt")])
    return folder


def index(capsys, *arguments):
    code = main(["shards", "index", *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    return code, lines[:-1], json.loads(lines[-1]), err


def test_index(folder, tmp_path, capsys):
    write(folder / "3.tar", ["a.json", "README", "../b.json", "b.txt"])
    code, lines, result, _ = index(capsys, folder)
    assert code == 0
    assert {name: result[name] for name in ("shards", "damaged_shards", "faults", "samples", "members")} == {
        "shards": 4, "damaged_shards": 0, "faults": 0, "samples": 63, "members": 123,
    }  # fmt: skip
    assert result["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert "60 samples of json, txt" in lines
    assert "2 samples of json" in lines
    assert "1 entries that belong to no sample: without a key or an extension" in lines
    assert any("3.tar: has keys that would leave their folder" in line and "../b" in line for line in lines)
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.index.safetensors")}
    assert len(made) == 4
    index(capsys, folder)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    index(capsys, folder, "--rebuild")
    assert all(path.stat().st_mtime_ns > before for path, before in made.items())
    for path in made:
        path.unlink()
    code, _, again, _ = index(capsys, folder / "{0..2}.tar", folder / "3.tar", "--index-folder", tmp_path / "indexes")
    assert (code, again["samples"]) == (0, 63)
    assert len(list((tmp_path / "indexes").iterdir())) == 4
    assert len(list(folder.iterdir())) == 4


def test_faults(folder, capsys):
    broken = bytearray((folder / "1.tar").read_bytes())
    broken[1024 * 9 + 110] ^= 4
    (folder / "1.tar").write_bytes(broken[:-20_000])
    for _ in range(2):
        code, lines, result, err = index(capsys, folder, folder / "none.tar")
        assert code == 1
        assert (result["faults"], result["damaged_shards"], result["shards"]) == (len(lines) - 1, 2, 4)
        assert lines[0].startswith(f"{folder}/1.tar: damaged header at byte 9216, where one can still read 14.txt")
        assert lines[1].startswith(f"{folder}/1.tar: truncated at byte")
        assert lines[-2] == f"{folder}/none.tar: cannot open: No such file or directory"
        assert err == f"herdkit: {result['faults']} faults in 2 of 4 shards\n"
        assert 40 < result["samples"] < 60


def test_several_workers(folder, capsys):
    _, _, one, _ = index(capsys, folder, "--rebuild")
    code, _, two, _ = index(capsys, folder, "--rebuild", "--workers", 2)
    assert code == 0
    assert {**two, "seconds": 0} == {**one, "seconds": 0}


def test_wrong_use(folder, capsys):
    for arguments, error in [
        ([folder / "x*.tar"], "no shards there"),
        ([folder, "--workers", "0"], "--workers must be at least 1"),
        ([folder, "--cache-bytes", "-1"], "limit must be at least 0"),
    ]:
        assert main(["shards", "index", *map(str, arguments)]) == 1
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["shards", "index", "--help"])
    assert exit.value.code == 0
    assert "example:\n  herdkit shards index" in capsys.readouterr().out
