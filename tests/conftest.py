"""Several test processes share the cores: their threads must not spin for each other's turn."""

import multiprocessing
import os
import runpy
import socket

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The server imports torch once; every process that a test starts is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["herdkit.text", "herdkit.train", "numpy.random", "torch._dynamo"])


@pytest.fixture
def start_program():
    """Runs a program in a process with `arguments` in its globals; none outlives the test."""
    processes = []

    def start(program, **arguments):
        process = PROCESSES.Process(target=runpy.run_path, args=(str(program), {"arguments": arguments}, "__main__"))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def finish_program(start_program):
    """Runs a program on some processes, as torchrun would, waits, and returns their exit codes."""

    def finish(program, processes=1, limit=180, **arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        layout = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = []
        for rank in range(processes):
            environ = {**layout, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            started.append(start_program(program, environ=environ, **arguments))
        for process in started:
            process.join(limit)
            assert not process.is_alive(), f"a process did not end within {limit} s"
        return [process.exitcode for process in started]

    return finish
