"""Shards behind URLs, against real servers: one of http.server, and moto's of S3."""

import io
import logging
import subprocess
import tarfile
import threading
import time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import fsspec
import pytest
from herdkit.data import remote_files
from herdkit.data.byte_cache import ByteCache
from herdkit.data.shards import ShardError, ShardReader

pytest.importorskip("aiohttp", reason='needs the extra "remote"')


def write(path, samples=40, size=20_000, prefix=""):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            for extension, content in [("txt", f"text {i}".encode()), ("bin", f"{i:04d}".encode() * (size // 4))]:
                member = tarfile.TarInfo(f"{prefix}{i:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


class Handler(SimpleHTTPRequestHandler):
    """Files with ETags, and ranges of them if the server has them; `server.troubles` happen to the next requests."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        span = self.headers.get("Range")
        server.requests.append((self.command, self.path, span))
        trouble = server.troubles.pop(0) if server.troubles and (body or server.troubles[0] == "503 all") else ""
        if trouble.startswith("503"):
            if trouble.endswith("all"):
                server.troubles.insert(0, trouble)
            self.send_error(503)
            return
        path = server.folder / self.path.lstrip("/")
        if path.is_dir():
            super().do_GET() if body else super().do_HEAD()
            return
        if not path.is_file() or "forbidden" in self.path:
            self.send_error(403 if "forbidden" in self.path else 404)
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        if span and server.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(content)) if last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.tags:
            self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            server.sent += end - start
            self.wfile.write(content[start : (start + end) // 2 if trouble == "drop" else end])
            self.close_connection = trouble == "drop"

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "FIRST_WAIT", 0.01)
    servers = []

    def serve(folder, ranges=True, tags=True):
        class Here(Handler):
            def __init__(self, *rest):
                super().__init__(*rest, directory=str(folder))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that hangs up
        server.folder, server.ranges, server.tags = folder, ranges, tags
        server.requests, server.troubles, server.sent = [], [], 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "s-0.tar", prefix="a")
    write(folder / "s-1.tar", prefix="b")
    return folder


@pytest.fixture
def cache(tmp_path):
    return ByteCache(tmp_path / "cache", 100 << 20)


@pytest.fixture
def right(folder, tmp_path):
    return contents(ShardReader(folder, index_folder=tmp_path / "local"))


def contents(reader):
    return [(sample.key, sample.members) for sample in reader]


def test_ranges(serve, folder, cache, right):
    server = serve(folder)
    reader = ShardReader(f"{server.url}/s-{{0..1}}.tar", cache=cache)
    assert reader.paths == [f"{server.url}/s-0.tar", f"{server.url}/s-1.tar"]
    assert contents(reader) == right
    assert reader[3].shard == f"{server.url}/s-0.tar"
    # What was read, and the indexes that were made, are cached.
    server.requests.clear()
    again = ShardReader(f"{server.url}/s-{{0..1}}.tar", cache=cache)
    assert contents(again) == right
    assert [method for method, *_ in server.requests] == ["HEAD", "HEAD"]


def test_one_sample_costs_little(serve, folder, tmp_path, cache, right):
    ShardReader(folder)  # whose indexes lie beside the shards, at the server
    server = serve(folder)
    reader = ShardReader(f"{server.url}/s-0.tar", cache=cache)
    opening = server.sent
    assert opening < 20_000
    assert (reader[20].key, reader[20].members) == right[20]
    assert server.sent - opening <= 2 * remote_files.CACHE_BLOCK
    nothing = ByteCache(tmp_path / "none", 0)
    assert contents(ShardReader(f"{server.url}/s-0.tar", cache=nothing)) == right[:40]


def test_patterns(serve, folder, cache, right, tmp_path):
    server = serve(folder)
    (folder / "readme.txt").write_text("no shard")
    for pattern in (f"{server.url}/*.tar", f"{server.url}/"):
        reader = ShardReader(pattern, cache=cache, index_folder=tmp_path / "local")
        assert [sample.key for sample in reader] == [key for key, _ in right]
    mixed = ShardReader([f"{server.url}/s-1.tar", folder / "s-0.tar"], cache=cache)
    assert contents(mixed) == right[40:] + right[:40]
    with pytest.raises(ShardError, match=r"x-\*.tar: no shards there"):
        ShardReader(f"{server.url}/x-*.tar", cache=cache)


def test_a_server_without_ranges(serve, folder, cache, right, caplog, tmp_path):
    server = serve(folder, ranges=False)
    url = f"{server.url}/s-{{0..1}}.tar"
    assert contents(ShardReader(url, cache=cache)) == right
    said = [record.message for record in caplog.records if "no range requests" in record.message]
    assert len(said) == 2
    assert said[0].startswith(f"{server.url}/s-")
    assert str(cache.folder) in said[0]
    assert sum(span is None and "index" not in path for method, path, span in server.requests if method == "GET") == 2
    small = ByteCache(tmp_path / "small", 10_000)
    with pytest.raises(ShardError, match=r"s-0.tar: cannot open: the cache of 10000 bytes in .*small has no room"):
        ShardReader(f"{server.url}/s-0.tar", cache=small)


def test_indexing_behind_a_web_server(serve, folder, tmp_path, capsys):
    from herdkit.cli import main

    server = serve(folder)
    arguments = ["shards", "index", f"{server.url}/s-{{0..1}}.tar", "--cache-folder", str(tmp_path / "c")]
    assert main(arguments) == 1
    assert "the index cannot be written beside it" in (error := capsys.readouterr().err)
    assert "name a folder for it" in error
    assert main([*arguments, "--index-folder", str(tmp_path / "indexes"), "--workers", "2"]) == 0
    assert '"samples": 80' in capsys.readouterr().out
    server.requests.clear()
    reader = ShardReader(f"{server.url}/s-{{0..1}}.tar", index_folder=tmp_path / "indexes")
    assert len(reader) == 80
    assert [method for method, *_ in server.requests] == ["HEAD", "HEAD"]


@pytest.mark.parametrize("troubles", [["503"], ["503"] * 4, ["drop"], ["drop", "503", "drop"]])
def test_passing_troubles(serve, folder, cache, right, troubles):
    server = serve(folder)
    reader = ShardReader(f"{server.url}/s-0.tar", cache=cache)
    server.troubles[:] = troubles
    assert (reader[7].key, reader[7].members) == right[7]
    assert server.troubles == []
    server.troubles[:] = troubles
    assert contents(ShardReader(f"{server.url}/s-1.tar", cache=cache)) == right[40:]


def test_lasting_troubles(serve, folder, cache, caplog):
    caplog.set_level(logging.INFO, "herdkit")
    server = serve(folder)
    reader = ShardReader(f"{server.url}/s-0.tar", cache=cache)
    server.requests.clear()
    server.troubles[:] = ["503 all"]
    other = ByteCache(cache.folder / "other", 1 << 20)
    reader._files[0]._cache = other
    with pytest.raises(ShardError, match=r"s-0.tar: cannot read sample a0005: no answer after 5 attempts: .*503"):
        reader[5]
    assert len(server.requests) == 5
    assert caplog.text.count("tried again in") == 4
    with pytest.raises(ShardError, match=r"s-1.tar: cannot open: no answer after 5 attempts: .*503"):
        ShardReader(f"{server.url}/s-1.tar", cache=cache)
    server.troubles.clear()
    assert reader[5].text() == "text 5"
    server.requests.clear()
    with pytest.raises(ShardError, match=r"none.tar: cannot open: No such file"):
        ShardReader(f"{server.url}/none.tar", cache=cache)
    with pytest.raises(ShardError, match=r"forbidden.tar: cannot open: .*403"):
        ShardReader(f"{server.url}/forbidden.tar", cache=cache)
    assert len(server.requests) <= 4
    with pytest.raises(ShardError, match=r"no answer after 5 attempts"):
        ShardReader("http://127.0.0.1:9/a.tar", cache=cache)


def test_waits_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(remote_files.time, "sleep", waits.append)

    def fail(*_):
        raise ConnectionResetError("reset")

    with pytest.raises(OSError, match="no answer after 5 attempts: ConnectionResetError: reset"):
        remote_files.patiently("memory://a", {}, fail)
    assert len(waits) == 4
    assert all(0.5 * 0.5 * 2**i <= wait <= 1.5 * 0.5 * 2**i for i, wait in enumerate(waits))


def test_a_shard_that_is_replaced(serve, folder, cache):
    """The ETag tells; without one the content does."""
    for tags in (True, False):
        write(folder / "s-0.tar", prefix="a")
        server = serve(folder, tags=tags)
        url = f"{server.url}/s-0.tar"
        old = ShardReader(url, cache=cache)
        assert old[0].key == "a0000"
        write(folder / "s-0.tar", prefix="c")
        assert [sample.key for sample in ShardReader(url, cache=cache)][:2] == ["c0000", "c0001"]
        with pytest.raises(ShardError, match="changed since it was indexed"):
            old[39]


def test_compressed(serve, folder, cache, right):
    for path in sorted(folder.iterdir()):
        subprocess.run(["gzip", path], check=True)
    server = serve(folder)
    reader = ShardReader(f"{server.url}/s-{{0..1}}.tar.gz", cache=cache)
    assert [contents(reader)[i] for i in (79, 0, 41, 40)] == [right[i] for i in (79, 0, 41, 40)]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert server.sent < 1.5 * size + 100_000


def test_threads_and_forks(serve, folder, cache, right):
    server = serve(folder)
    reader = ShardReader(f"{server.url}/s-{{0..1}}.tar", cache=cache)
    assert (reader[0].key, reader[0].members) == right[0]
    wrong = []

    def work(start):
        for i in range(start, 80, 3):
            if reader[i].members != right[i][1]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    fresh = ShardReader(f"{server.url}/s-{{0..1}}.tar", cache=ByteCache(cache.folder / "other"))
    _shared.append(fresh)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_read, range(0, 80, 5)) == [right[i] for i in range(0, 80, 5)]
    _shared.clear()


_shared = []


def _read(i):
    sample = _shared[0][i]
    return sample.key, sample.members


def test_any_protocol(folder, cache, right):
    fs = fsspec.filesystem("memory")
    for path in folder.iterdir():
        fs.pipe_file(f"/shards/{path.name}", path.read_bytes())
    for given in ("memory://shards/", "memory://shards", "memory://shards/s-*.tar", "memory://shards/s-{0..1}.tar"):
        assert contents(ShardReader(given, cache=cache)) == right
    fs.rm("/shards", recursive=True)
    with pytest.raises(ShardError, match=r"gs://none/a.tar|a.tar"):
        ShardReader("memory://none/a.tar", cache=cache)
    with pytest.raises((ModuleNotFoundError, ShardError), match=r'extra "remote"|cannot open'):
        ShardReader("gs://none/a.tar", cache=cache)


@contextmanager
def s3():
    server = pytest.importorskip("moto.server", reason='needs the extra "test"')
    pytest.importorskip("s3fs", reason='needs the extra "remote"')
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        yield f"http://{running._server.server_address[0]}:{running._server.server_port}"
    finally:
        running.stop()


def test_s3(folder, cache, right, monkeypatch, tmp_path, capsys):
    from herdkit.cli import main

    with s3() as endpoint:
        options = {"endpoint_url": endpoint, "key": "k", "secret": "s"}
        fs = fsspec.filesystem("s3", **options)
        fs.mkdir("bucket")
        for path in folder.iterdir():
            fs.pipe_file(f"bucket/train/{path.name}", path.read_bytes())
        for given in ("s3://bucket/train/", "s3://bucket/train/s-{0..1}.tar", "s3://bucket/*/s-*.tar"):
            reader = ShardReader(given, cache=cache, storage_options=options)
            assert reader.paths == ["s3://bucket/train/s-0.tar", "s3://bucket/train/s-1.tar"]
            assert contents(reader) == right
        with pytest.raises(ShardError, match=r"s3://bucket/train/none.tar: cannot open: No such file"):
            ShardReader("s3://bucket/train/none.tar", cache=cache, storage_options=options)
        # The command takes its settings from the environment, as all programs do that use fsspec.
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        assert main(["shards", "index", "s3://bucket/train/", "--cache-folder", str(tmp_path / "c")]) == 0
        assert '"samples": 80' in capsys.readouterr().out
        fs.invalidate_cache()
        assert {path.rpartition("/")[2] for path in fs.ls("bucket/train")} == {
            "s-0.tar", "s-0.tar.index.safetensors", "s-1.tar", "s-1.tar.index.safetensors",
        }  # fmt: skip
        monkeypatch.setattr("herdkit.data.index_files.scan_samples", lambda *_, **__: pytest.fail("no index used"))
        other = ByteCache(tmp_path / "other")
        assert contents(ShardReader("s3://bucket/train/", cache=other)) == right


def test_s3_that_does_not_answer(serve, folder, cache):
    pytest.importorskip("s3fs", reason='needs the extra "remote"')
    server = serve(folder)
    server.troubles[:] = ["503 all"]
    options = {"endpoint_url": server.url, "key": "k", "secret": "s"}
    start = time.monotonic()
    with pytest.raises(ShardError, match=r"s3://bucket/a.tar: cannot open: no answer after 5 attempts"):
        ShardReader("s3://bucket/a.tar", cache=cache, storage_options=options)
    assert time.monotonic() - start < 60
