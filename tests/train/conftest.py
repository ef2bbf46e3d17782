import importlib.util
from pathlib import Path

import pytest

TOYS = Path(__file__).with_name("toys.py")


@pytest.fixture(scope="session")
def toys():
    spec = importlib.util.spec_from_file_location("train_toys", TOYS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(start_program):
    """Starts `toys.main(**arguments)`, or that of another program, in a process; none outlives the test."""
    return lambda program=TOYS, **arguments: start_program(program, **arguments)


@pytest.fixture
def finish(finish_program):
    """Starts `toys.main`, or that of another program, on some processes, waits, and returns their exit codes."""
    return lambda processes=1, program=TOYS, **arguments: finish_program(program, processes, **arguments)
