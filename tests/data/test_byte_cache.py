import contextlib
import os
import random
import threading
import time
from multiprocessing import get_context

import pytest
from herdkit.data import byte_cache
from herdkit.data.byte_cache import ByteCache, CacheFullError


def used(folder):
    total = 0
    for path in folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):  # replaced by another process meanwhile
            total += path.stat().st_size
    return total


def test_entries(tmp_path):
    cache = ByteCache(tmp_path / "new" / "cache", 1000)
    assert cache.get("a") is None
    assert cache.size("a") is None
    cache.put("a", b"0123456789")
    cache.put("../../b\0", b"")
    assert cache.get("a") == b"0123456789"
    assert cache.get("a", 3, 4) == b"3456"
    assert cache.get("a", 8, 4) == b"89"
    assert cache.get("a", 20, 4) == b""
    assert (cache.size("a"), cache.get("../../b\0")) == (10, b"")
    assert [path.name for path in (tmp_path).iterdir()] == ["new"]
    assert ByteCache(tmp_path / "new" / "cache").get("a", 1, 2) == b"12"
    with pytest.raises(ValueError, match="limit"):
        ByteCache(tmp_path, -1)


def test_the_least_recently_used_go(tmp_path):
    cache = ByteCache(tmp_path, 1000)
    for i in range(10):
        cache.put(str(i), bytes(100))
    assert used(tmp_path) == 1000
    cache.get("0")
    cache.put("10", bytes(50))
    assert used(tmp_path) <= 1000
    left = [i for i in range(11) if cache.get(str(i)) is not None]
    assert left[0] == 0
    assert left[1:] == list(range(11 - len(left) + 1, 11))
    with pytest.raises(CacheFullError, match=r"the cache of 1000 bytes in .* has no room for 1001 bytes"):
        cache.put("large", bytes(1001))
    assert cache.size("large") is None
    cache.put("all", bytes(1000))
    assert used(tmp_path) == 1000
    # Another, smaller limit holds from the next entry on.
    ByteCache(tmp_path, 300).put("small", bytes(10))
    assert used(tmp_path) <= 300


def test_large_entries_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_cache, "_STEP", 700)
    cache = ByteCache(tmp_path, 10_000)
    calls = []

    def write(entry):
        calls.append(threading.get_ident())
        for i in range(50):
            entry.write(bytes([i]) * 100)
            assert used(tmp_path) <= 10_000
            time.sleep(0.001)

    threads = [threading.Thread(target=cache.make, args=("a", write)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert cache.get("a") == b"".join(bytes([i]) * 100 for i in range(50))
    assert used(tmp_path) == 5000
    with pytest.raises(CacheFullError):
        cache.make("b", lambda entry: [entry.write(bytes(100)) for _ in range(101)])

    def fail(entry):
        entry.write(bytes(2000))
        raise RuntimeError("half done")

    with pytest.raises(RuntimeError, match="half done"):
        cache.make("c", fail)
    assert cache.size("c") is None
    assert not list(tmp_path.rglob("*.partial"))
    for i in range(10):
        cache.put(f"fill {i}", bytes(1000))  # nothing stays reserved that nobody uses
    assert used(tmp_path) == 10_000


def test_opened_entries_stay_readable(tmp_path):
    cache = ByteCache(tmp_path, 1000)
    cache.put("a", bytes(600))
    with cache.path("a").open("rb") as file:
        cache.put("b", bytes(600))
        assert cache.get("a") is None
        assert file.read() == bytes(600)


def test_what_killed_processes_left(tmp_path):
    cache = ByteCache(tmp_path, 1000)
    cache.put("a", bytes(10))
    killed = cache._entry("b", 900)
    killed.__enter__()
    (partial,) = tmp_path.rglob("*.partial")
    with pytest.raises(CacheFullError):  # perhaps it is being written
        cache.put("b", bytes(500))
    hours_ago = time.time() - 2 * 3600
    os.utime(partial, (hours_ago, hours_ago))
    cache.put("b", bytes(500))
    assert not partial.exists()
    # Without its count the cache counts again.
    (tmp_path / "total.lock").unlink()
    cache.put("c", bytes(600))
    assert used(tmp_path) <= 1000


def test_no_entry_changes_its_name_while_the_folder_is_listed(tmp_path):
    cache, written = ByteCache(tmp_path, 1000), threading.Event()

    def finish():
        with cache._entry("a", 10) as entry:
            entry.write(bytes(10))
            written.set()
            listed.wait(60)

    listed, thread = threading.Event(), threading.Thread(target=finish)
    thread.start()
    assert written.wait(60)
    with cache._locked("total"):
        listed.set()
        thread.join(0.3)
        assert thread.is_alive()
        assert cache.size("a") is None
    thread.join(60)
    assert cache.size("a") == 10


def _use(job):
    """Some work on a cache that others use too; the largest size seen, and whether any entry was wrong."""
    folder, seed = job
    draw, cache, most, wrong = random.Random(seed), ByteCache(folder, 50_000), 0, 0
    for _ in range(100):
        name = str(draw.randrange(60))
        content = name.encode() * (500 + 40 * int(name))
        found = cache.get(name)
        wrong += found not in (None, content)
        if found is None:
            if draw.random() < 0.5:
                cache.put(name, content)
            else:
                cache.make(name, lambda entry, content=content: entry.write(content))
        with cache._locked("total"):  # while nobody makes room or takes it
            most = max(most, used(folder))
    return most, wrong


def test_many_processes(tmp_path):
    with get_context("fork").Pool(4) as pool:
        results = pool.map(_use, [(tmp_path, seed) for seed in range(4)])
    assert max(most for most, _ in results) <= 50_000
    assert sum(wrong for _, wrong in results) == 0
    assert used(tmp_path) > 20_000


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("HERDKIT_CACHE", raising=False)
    assert ByteCache().folder == tmp_path / "x" / "herdkit"
    monkeypatch.setenv("HERDKIT_CACHE", str(tmp_path / "h"))
    assert ByteCache().folder == tmp_path / "h"
    assert list(tmp_path.iterdir()) == []
