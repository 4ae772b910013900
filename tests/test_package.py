"""The sdist and the wheel hold the tree, and the wheel works without the checkout.

The sdist is built from a copy of the checkout, the wheel from the sdist, and the wheel goes into
an environment without the checkout, an engine or torch. There, in a folder that holds no `kvcache`,
a small program runs, and so do the tests of the compiled modules: compiled code checks types at run
time and cannot be patched. All other files of the wheel are those of the checkout.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvcache
from tests.install_engine import ENGINE_VERSION
from tests.support import marks

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).resolve().parent.parent
TESTS_OF_COMPILED = (
    "tests/core/test_index.py",
    "tests/core/test_index_restore.py",
    "tests/core/test_keys.py",
    "tests/core/test_segments.py",
    "tests/core/test_stack.py",
    "tests/eviction",
    "tests/tiers/test_dram.py",
)
TEST_WITH = ("pytest>=9", "hypothesis", "opentelemetry-sdk")
NOT_PUBLISHED = (".*", "build", "dist", "env", "model", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without PYTHONPATH; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    marks.require("wheel")
    tree, dist = tmp_path_factory.mktemp("tree") / "kvcache", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
    run(sys.executable, "-m", "build", "--outdir", dist, cwd=tree)
    return dist


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    [built] = dist.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [built] = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and the requirements of the tests."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment, cwd=environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, *TEST_WITH, cwd=environment)
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with the tests and without a `kvcache`, outside the checkout."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_editable_install_is_imported_beside_a_folder_named_kvcache(
    tmp_path: Path,
) -> None:
    (tmp_path / "kvcache").mkdir()  # the usual name of a checkout
    run(sys.executable, "-c", "from kvcache import block_keys", cwd=tmp_path)


def test_wheel_holds_the_files_of_the_tree(wheel: Path) -> None:
    tree = {
        Path(folder, file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "kvcache", followlinks=True)
        for file in files
        if not folder.endswith("__pycache__")
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        name for name in names if not name.endswith(".so") and ".dist-info/" not in name
    } == tree


def test_wheel_passes_the_smoke_test_of_the_wheels_workflow(
    wheel: Path, python: Path, elsewhere: Path
) -> None:
    """Also that the file, the metadata, the module and the command have the source's version."""
    assert wheel.name.startswith(f"kvcache-{kvcache.__version__}-")
    smoke = (ROOT / "tests" / "wheel_smoke.py", ROOT / "setup.py")
    assert run(python, "-P", *smoke, cwd=elsewhere).split()[:1] == [kvcache.__version__]


def test_wheel_holds_compiled_modules_of_a_lookup(python: Path, elsewhere: Path) -> None:
    names = ("index", "keys", "segments", "eviction.gittins.policy", "eviction.gittins.ranking")
    code = "from importlib import import_module; " + "; ".join(
        f"print(import_module('kvcache.{name}').__file__)" for name in names
    )
    files = run(python, "-P", "-c", code, cwd=elsewhere).split()
    assert [file.endswith(".so") for file in files] == [True] * len(names), files
    code = "from kvcache.cli.doctor.versions import check; print(next(check(None)))"
    assert ", compiled, Python" in run(python, "-P", "-c", code, cwd=elsewhere)


def test_wheel_built_without_a_compiler_holds_no_compiled_module(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path)
    run(*pip, sdist, cwd=tmp_path)
    [built] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(built).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "kvcache/index.py" in names


def test_wheel_is_imported_from_its_environment(python: Path, elsewhere: Path) -> None:
    where = run(python, "-P", "-c", "import kvcache; print(kvcache.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    assert "demo" in run(python.parent / "kvcache", "--help", cwd=elsewhere)


def test_tests_of_compiled_modules_pass_on_the_wheel(python: Path, elsewhere: Path) -> None:
    pytest_command = (python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*pytest_command, *TESTS_OF_COMPILED, cwd=elsewhere)


@pytest.mark.parametrize(
    ("group", "function"),
    [
        ("vllm.general_plugins", "kvcache.connectors.vllm.plugin:register"),
        ("sglang.srt.plugins", "kvcache.connectors.sglang.weight_updates:register"),
    ],
)
def test_wheel_has_the_entry_point_of_each_plugin(
    python: Path, elsewhere: Path, group: str, function: str
) -> None:
    code = (
        "from importlib.metadata import entry_points;"
        f"print(*entry_points(group={group!r}, name='kvcache'))"
    )
    assert function in run(python, "-P", "-c", code, cwd=elsewhere)


def test_wheel_vllm_extra_leaves_engine_and_torch_alone(wheel: Path) -> None:
    pytest.importorskip("vllm")
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-")
    report = run(*pip, f"{wheel}[vllm]", cwd=wheel.parent)
    planned = json.loads(report[report.index("{") : report.rindex("}") + 1])["install"]
    assert [package["metadata"]["name"] for package in planned] == ["kvcache"]
    with zipfile.ZipFile(wheel) as files:
        [path] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = files.read(path).decode()
    # Nor may pip install another vLLM where the engine has another name.
    wants = re.findall(r"(?m)^Requires-Dist: ([\w-]+).*extra == .vllm.$", metadata)
    assert wants == ["numba"]


@pytest.mark.engine
def test_vllm_command_of_the_environment_starts(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    assert ENGINE_VERSION in run(Path(sys.executable).with_name("vllm"), "--version", cwd=tmp_path)


@pytest.mark.engine
def test_engine_runs_on_the_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    zipfile.ZipFile(wheel).extractall(tmp_path)  # beside the engine, in this environment
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    where = run(sys.executable, "-c", "from kvcache import index; print(index)", cwd=tmp_path)
    assert f"{tmp_path}/kvcache/index" in where
    selected = "test_start_logs_no_warning or with_synchronous_copies"
    tests = ("tests/e2e/test_one_process.py", "-k", selected)
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=tmp_path)
