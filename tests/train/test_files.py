import pytest
from herdkit.train import files


def test_a_copied_tree_is_durable(tmp_path, monkeypatch):
    source, to = tmp_path / "source", tmp_path / "to"
    (source / "part").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"a" * 3)
    (source / "part" / "b.bin").write_bytes(b"b" * 5)
    to.mkdir()
    synced = {}

    def sync(path):
        synced[path.relative_to(tmp_path).as_posix()] = (
            sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) if path.is_dir() else path.read_bytes()
        )

    monkeypatch.setattr(files, "sync", sync)
    files.copy_tree(source, to)
    # Each once it is whole, directories after what is in them.
    assert list(synced.items()) == [
        ("to/a.bin", b"aaa"),
        ("to/part/b.bin", b"bbbbb"),
        ("to/part", ["b.bin"]),
        ("to", ["a.bin", "part", "part/b.bin"]),
    ]
    with pytest.raises(FileNotFoundError):
        files.copy_tree(tmp_path / "none", to)
