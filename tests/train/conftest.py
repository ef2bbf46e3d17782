import importlib.util
import multiprocessing
import runpy
import socket
from pathlib import Path

import pytest

TOYS = Path(__file__).with_name("toys.py")
# The server imports torch once; every process that a test starts is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["herdkit.train", "numpy.random", "torch._dynamo"])


@pytest.fixture(scope="session")
def toys():
    spec = importlib.util.spec_from_file_location("train_toys", TOYS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start():
    """Starts `toys.main(**arguments)` in a process; none outlives the test."""
    processes = []

    def start(**arguments):
        process = PROCESSES.Process(target=runpy.run_path, args=(str(TOYS), {"arguments": arguments}, "__main__"))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def finish(start):
    """Starts `toys.main` on some processes, waits, and returns their exit codes."""

    def finish(processes=1, limit=180, **arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        layout = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = []
        for rank in range(processes):
            environ = {**layout, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            started.append(start(environ=environ, **arguments))
        for process in started:
            process.join(limit)
            assert not process.is_alive(), f"a process did not end within {limit} s"
        return [process.exitcode for process in started]

    return finish
