"""A built wheel, installed elsewhere, is the whole package."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "benchmarks", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    shutil.copytree(ROOT, source / "herdkit", ignore=LEFT_OUT)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run(build, cwd=source / "herdkit", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("herdkit-*.whl")
    return built


def test_it_holds_every_module_recipe_and_marker_and_no_tests(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("herdkit/")}
    expected = {
        f"herdkit/{path.relative_to(ROOT)}"
        for room in ("adapters", "data", "demos", "speech", "text", "train", "vision")
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / room).rglob(pattern)
    }
    assert names == expected | {f"herdkit/{name}" for name in ("__init__.py", "__main__.py", "cli.py", "py.typed")}
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_it_runs_where_it_is_installed(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    where = run("-c", "import herdkit; print(herdkit.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(site), where.stderr
    assert "demo" in run("-m", "herdkit", "--help").stdout
    recipe = site / "herdkit" / "text" / "recipes" / "tiny_pretrain.yaml"
    train = run("-m", "herdkit", "train", str(recipe), "--run-dir", "run", "root=nowhere")
    assert train.returncode == 1
    assert train.stderr.startswith("herdkit: nowhere/data/")
    assert len(train.stderr.splitlines()) == 1
