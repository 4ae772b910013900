"""What is published is the tree, and works alone.

The sdist is built from a copy of the checkout, the wheel from the sdist, and the wheel goes into
an environment that has never seen the checkout, an engine or torch. The tests that need neither
pass there too, from a folder in which no `kvcache` lies.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALONE = ("core", "tiers", "profiles")
TEST_WITH = ("pytest>=9", "hypothesis", "opentelemetry-sdk", "redis>=6")  # a profile has redis
NOT_PUBLISHED = (".*", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, with no setting of ours; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the sdist."""
    tree, dist = tmp_path_factory.mktemp("tree") / "kvcache", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
    run(sys.executable, "-m", "build", "--outdir", dist, cwd=tree)
    [built] = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and what the tests need."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment, cwd=environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, *TEST_WITH, cwd=environment)
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the checkout that holds the tests, and no `kvcache`."""
    for folder in ALONE:
        shutil.copytree(ROOT / "tests" / folder, tmp_path / "tests" / folder)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    tree = {
        Path(folder, file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "kvcache", followlinks=True)
        for file in files
        if not folder.endswith("__pycache__")
    }
    published = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert published == tree


def test_the_wheel_works_where_nothing_else_is(python: Path, elsewhere: Path) -> None:
    where = run(python, "-P", "-c", "import kvcache; print(kvcache.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    assert "demo" in run(python.parent / "kvcache", "--help", cwd=elsewhere)
    tests = [f"tests/{folder}" for folder in ALONE]
    run(python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=elsewhere)


def test_the_connector_is_announced_to_vllm(python: Path, elsewhere: Path) -> None:
    code = (
        "from importlib.metadata import entry_points;"
        "print(*entry_points(group='vllm.general_plugins', name='kvcache'))"
    )
    assert "kvcache.connectors.vllm.plugin:register" in run(python, "-P", "-c", code, cwd=elsewhere)
