"""The packages import each other in one direction, and the core stays small and is_core_import.

The direction is `kvcache <- tiers <- profiles <- connectors`. An import under TYPE_CHECKING and a
module name in a string count as imports. `imports_out_of_order` checks any tree, so that the tests
can run it on trees that break the rule.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kvcache", "tiers", "profiles", "connectors")
COMMAND_LINE = re.compile(r"kvcache/(__main__|cli|cli/.*)\.py")

# The core may import these; its contract suites may also import pytest.
CORE_IMPORTS = sys.stdlib_module_names | {"opentelemetry"}
HEAVY_OPENTELEMETRY = ("opentelemetry.sdk", "opentelemetry.exporter")
ALSO_ALLOWED = {"kvcache/testing": {"pytest"}}

MAX_LINES = 400
MACHINE_PATH = re.compile(rb"(?<![\w.~$-])/(?:home|root|tmp|work|workspace|Users)/[\w.-]+(?=/)")


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    """The Python files below `folders`; rglob does not follow the links between the packages."""
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def package_of(name: str) -> str | None:
    """The package of the module with this dotted name; None for a third-party module."""
    first, *rest = name.split(".")
    if first != "kvcache":
        return None
    return rest[0] if rest and rest[0] in PACKAGES else "kvcache"


class Imports(ast.NodeVisitor):
    """Collects line, dotted name, and whether it runs at import time, of each import in a file."""

    def __init__(self, package: list[str]) -> None:
        self.package = package
        self.found: list[tuple[int, str, bool]] = []
        self.at_import = True

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name, self.at_import) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        parts = [*base, *filter(None, [node.module])]
        for alias in node.names:
            self.found.append((node.lineno, ".".join([*parts, alias.name]), self.at_import))

    def visit_Constant(self, node: ast.Constant) -> None:
        names = "|".join(PACKAGES[1:])
        if isinstance(node.value, str) and re.fullmatch(rf"kvcache\.({names})[\w.:]*", node.value):
            self.found.append((node.lineno, node.value.replace(":", "."), False))

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self._visit_deferred(*node.body)
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_deferred(*ast.iter_child_nodes(node))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_deferred(*ast.iter_child_nodes(node))

    def _visit_deferred(self, *nodes: ast.AST) -> None:
        before, self.at_import = self.at_import, False
        for node in nodes:
            self.visit(node)
        self.at_import = before


def imports_out_of_order(root: Path) -> list[str]:
    """Return place and reason of each import under `root` that is not allowed."""
    problems = []
    for path in python_files(root, *PACKAGES):
        file = path.relative_to(root).as_posix()
        package, *rest = path.relative_to(root).with_suffix("").parts
        parents = ["kvcache"] if package == "kvcache" else ["kvcache", package]
        imports = Imports(parents + rest[:-1])
        imports.visit(ast.parse(path.read_text(encoding="utf-8"), file))
        for line, name, at_import in imports.found:
            reason = refusal(file, package, rest, name, at_import)
            if reason:
                problems.append(f"{file}:{line}: {name}: {reason}")
    return problems


def refusal(file: str, package: str, rest: list[str], name: str, at_import: bool) -> str:
    """Return why this file may not import `name`; empty if it may."""
    first, folder = name.partition(".")[0], file.rpartition("/")[0]
    if first in PACKAGES[1:]:
        return f"import it as kvcache.{first}"
    target = package_of(name)
    is_core_import = target == "kvcache" or (
        first in CORE_IMPORTS | ALSO_ALLOWED.get(folder, set())
        and not name.startswith(HEAVY_OPENTELEMETRY)
    )
    if COMMAND_LINE.fullmatch(file):
        return (
            "the command line imports this inside functions only"
            if at_import and not is_core_import
            else ""
        )
    if package == "kvcache" and target is None and not is_core_import:
        return "the core imports the standard library and the OpenTelemetry API"
    if target is not None and PACKAGES.index(target) > PACKAGES.index(package):
        return f"{package} may not import {target}"
    if package == target == "tiers" and name.split(".")[2:3] != rest[:1]:
        return "tiers do not import each other"
    return ""


def test_imports_run_one_way() -> None:
    assert imports_out_of_order(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("kvcache/stack.py", "import kvcache.tiers.dram", "kvcache may not import tiers"),
        ("kvcache/stack.py", "from kvcache import profiles", "kvcache may not import profiles"),
        ("kvcache/stack.py", "def f(): from . import tiers", "kvcache may not import tiers"),
        ("kvcache/stack.py", "KIND = 'kvcache.tiers.dram:DramTier'", "may not import tiers"),
        ("kvcache/stack.py", "if TYPE_CHECKING: import kvcache.connectors", "may not import conn"),
        ("kvcache/stack.py", "def f(): import torch", "the core imports"),
        ("kvcache/stack.py", "import pytest", "the core imports"),
        ("kvcache/stack.py", "from opentelemetry.sdk import trace", "the core imports"),
        ("kvcache/stack.py", "import tiers", "import it as kvcache.tiers"),
        ("kvcache/__main__.py", "import kvcache.profiles", "inside functions only"),
        (
            "kvcache/cli/demo/__init__.py",
            "class A:\n    from vllm import LLM",
            "inside functions only",
        ),
        ("tiers/dram.py", "from ..profiles import open_stack", "tiers may not import profiles"),
        ("tiers/redis.py", "from .dram import DramTier", "tiers do not import each other"),
        ("tiers/redis.py", "from kvcache.tiers import dram", "tiers do not import each other"),
        (
            "profiles/load.py",
            "import kvcache.connectors.transfer.cpu",
            "profiles may not import conn",
        ),
    ],
)
def test_import_out_of_order_is_found(tmp_path: Path, file: str, source: str, reason: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    [problem] = imports_out_of_order(tmp_path)
    assert problem.startswith(f"{file}:")
    assert reason in problem


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kvcache/stack.py", "import json\nfrom opentelemetry import trace\nfrom . import keys"),
        ("kvcache/testing/tier.py", "import pytest"),
        (
            "kvcache/cli/demo/__init__.py",
            "if TYPE_CHECKING: import torch\ndef f(): import kvcache.profiles",
        ),
        ("kvcache/cli/__init__.py", "from kvcache.cli import demo\nfrom kvcache import stack"),
        ("tiers/redis.py", "import redis\nfrom kvcache.tier import Tier"),
        ("profiles/tiers.py", "KIND = 'kvcache.tiers.dram:DramTier'"),
        ("connectors/vllm/worker.py", "from ..pages import Pages\nfrom kvcache import profiles"),
    ],
)
def test_import_in_order_is_accepted(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert imports_out_of_order(tmp_path) == []


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_import_of_a_linked_package_by_its_bare_name_raises(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"ImportError: import kvcache.{package}, not {package}" in done.stderr


def test_import_of_kvcache_loads_no_heavy_module() -> None:
    code = (
        "import sys; before = set(sys.modules); import kvcache; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    brought = set(done.stdout.split())
    assert "kvcache" in brought
    assert not brought & {
        "flash_attn", "http.client", "hypothesis", "numba", "numpy", "pytest", "redis", "ssl",
        "torch", "vllm", "xformers", "zstandard", "kvcache.cli", "kvcache.connectors",
        "kvcache.profiles", "kvcache.tiers", "opentelemetry.sdk",
    }  # fmt: skip


def parts_in_circles(root: Path) -> set[str]:
    """The modules and packages of the core that import each other in a circle.

    A package counts as one part. ``kvcache/__init__.py`` and the command line import many others,
    and no part of the core imports them.
    """
    arrows: dict[str, set[str]] = {}
    for path in python_files(root, "kvcache"):
        part, *rest = path.relative_to(root / "kvcache").with_suffix("").parts
        if part in ("__init__", "__main__", "cli"):
            continue
        imports = Imports(["kvcache", part, *rest][:-1])
        imports.visit(ast.parse(path.read_text(encoding="utf-8")))
        names = [name.split(".") for _, name, _ in imports.found]
        targets = {name[1] for name in names if name[0] == "kvcache" and len(name) > 1}
        arrows.setdefault(part, set()).update(targets - {part})
    reached = {part: set(targets) for part, targets in arrows.items()}
    for _ in reached:  # each round follows one more arrow
        for targets in reached.values():
            targets.update(*(reached.get(target, set()) for target in list(targets)))
    return {part for part, targets in reached.items() if part in targets}


def test_core_has_no_circle_of_imports() -> None:
    assert parts_in_circles(ROOT) == set()


def test_circle_between_packages_is_found(tmp_path: Path) -> None:
    sources = {
        "lower/tier.py": "from kvcache.guards.calls import check",
        "lower/pool.py": "import threading",
        "guards/front.py": "from kvcache.lower.pool import Pool",
        "guards/calls.py": "from kvcache import secrets",
        "secrets.py": "import re",
    }
    for file, source in sources.items():
        (tmp_path / "kvcache" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kvcache" / file).write_text(source)
    assert parts_in_circles(tmp_path) == {"guards", "lower"}


def test_no_file_is_longer_than_the_limit() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(ROOT, *PACKAGES, "tests")
    }
    assert {file: n for file, n in lines.items() if n > MAX_LINES} == {}


def machine_paths(root: Path) -> list[str]:
    """Return the place of each absolute path of a machine in the files of the project."""
    files = [path for kind in ("*.md", "*.toml", "*.yaml", "Makefile") for path in root.glob(kind)]
    for folder in (*PACKAGES, "tests", "docs", ".ci", ".github"):
        files += (root / folder).rglob("*")
    return [
        f"{path.relative_to(root)}:{number}: {match[0].decode()}"
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        for match in MACHINE_PATH.finditer(line)
    ]


def test_no_file_has_a_path_of_a_machine() -> None:
    assert machine_paths(ROOT) == []


def test_path_of_a_machine_is_found(tmp_path: Path) -> None:
    home = Path("/", "home", "someone")
    (tmp_path / "README.md").write_text(f"one\nread it from {home}/models\n")
    assert machine_paths(tmp_path) == [f"README.md:2: {home}"]
