"""What an installed herdkit must hold."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import herdkit
import pytest
from herdkit.train.config import load_recipe
from herdkit.train.recipe import find_stage, read_stage_name

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("*/recipes/*.yaml"))


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = ("adapters", "data", "demos", "speech", "text", "train", "vision")
    found = {"herdkit"}
    for room in rooms:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add(".".join(("herdkit", *init.parent.relative_to(ROOT).parts)))
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_stage(path):
    stage = find_stage(read_stage_name(path))
    assert load_recipe(path, stage.recipe).stage in {point.name for point in entry_points(group="herdkit.stages")}


def test_the_data_package_imports_no_models():
    code = "import sys, herdkit.data; print(sorted(m for m in sys.modules if m.startswith('herdkit.')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name.startswith("herdkit.data") for name in ast.literal_eval(found.stdout))


def test_the_public_names_are_there():
    assert {name for name in herdkit.__all__ if getattr(herdkit, name) is not None} == set(herdkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        herdkit.laod  # noqa: B018


def test_there_are_recipes():
    assert len(RECIPES) >= 10
