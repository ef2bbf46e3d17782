import importlib.util
from functools import partial
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
    """Starts `toys.main(**arguments)` in a process; none outlives the test."""
    return partial(start_program, TOYS)


@pytest.fixture
def finish(finish_program):
    """Starts `toys.main` on some processes, waits, and returns their exit codes."""
    return partial(finish_program, TOYS)
