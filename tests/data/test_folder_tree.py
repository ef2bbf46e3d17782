import os
import subprocess

import pytest
from herdkit.data.drafts import Draft, Problem
from herdkit.data.folder_tree import FolderTree
from herdkit.data.shard_writing import write_shards
from herdkit.data.shards import ShardReader


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


NAMES = [
    *("b.txt", "b.JPG", "a.seg.png", "a.txt", "é.txt", "part.one/a.txt", "part.one/sub/deep/c.d.e", "part.one/sub/a.b"),
    *("__meta__/x.txt", "README", ".hidden.txt", "part.one/README", "part-two/z.txt", "Part/z.txt", "a b/c d.txt"),
]


def test_samples_are_those_that_readers_find_in_tar(tmp_path):
    tree = tmp_path / "tree"
    fill(tree, NAMES)
    members = sorted(entry.name for entry in tree.iterdir())
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "by-tar.tar", "-C", tree, *members], check=True)
    write_shards(tmp_path / "ours" / "%d.tar", FolderTree(tree))
    theirs = {sample.key: sample.members for sample in ShardReader(tmp_path / "by-tar.tar")}
    ours = {sample.key: sample.members for sample in ShardReader(tmp_path / "ours")}
    assert ours == theirs
    assert ours["b"] == {"jpg": b"content of b.JPG", "txt": b"content of b.txt"}
    assert len(ours) == 9


def test_order_and_what_is_left_out(tmp_path):
    fill(tmp_path, [*NAMES, ".git/config.txt"])
    tree = FolderTree(tmp_path)
    keys = [sample.key for sample in tree]
    assert keys == [
        *("a", "b", "é", "Part/z", "a b/c d", "part-two/z", "part.one/a", "part.one/sub/a", "part.one/sub/deep/c")
    ]
    assert [sample.key for sample in tree] == keys
    assert (tree.ignored, tree.first_ignored) == (5, str(tmp_path / ".git"))


def test_nothing_depends_on_the_order_of_directories(tmp_path, monkeypatch):
    fill(tmp_path, NAMES)
    before = list(FolderTree(tmp_path))
    scan = os.scandir

    class Backwards:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            with scan(self.path) as entries:
                return iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert list(FolderTree(tmp_path)) == before


def test_links(tmp_path):
    fill(tmp_path / "tree", ["a.txt", "below/b.txt"])
    fill(tmp_path / "other", ["c.txt"])
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "tree" / "a.jpg").symlink_to(tmp_path / "other" / "c.txt")
    (tmp_path / "tree" / "below" / "up").symlink_to("..")
    (tmp_path / "tree" / "self.txt").symlink_to("self.txt")
    found = list(FolderTree(tmp_path / "tree"))
    assert [draft.key for draft in found if isinstance(draft, Draft)] == ["a", "self", "below/b", "linked/c"]
    assert found[0].members == {"jpg": tmp_path / "tree" / "a.jpg", "txt": tmp_path / "tree" / "a.txt"}
    (loop,) = [problem for problem in found if isinstance(problem, Problem)]
    assert str(loop) == f"{tmp_path / 'tree' / 'below' / 'up'}: a link that leads back to a folder around it"


def test_two_files_for_one_member(tmp_path):
    fill(tmp_path, ["a.jpg", "a.JPG", "b.txt"])
    wrong, good = FolderTree(tmp_path)
    assert "sample a: two files for the member 'jpg'" in str(wrong)
    assert good.key == "b"


def test_no_folder(tmp_path):
    with pytest.raises(NotADirectoryError, match="no such folder"):
        FolderTree(tmp_path / "none")
