"""The rooms keep their order, and what is small and light stays so.

Imports run one way, `kvcache <- tiers <- profiles <- connectors`; an import under TYPE_CHECKING
or by a name in a string is an import. `imports_out_of_order` finds what breaks this in any tree,
so that it is tried here on trees that do.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kvcache", "tiers", "profiles", "connectors")
ROOF = re.compile(r"kvcache/(__main__|cli|cli/.*)\.py")

# The core stands on these and the standard library. Its contract suite is for those who test.
LIGHT = sys.stdlib_module_names | {"opentelemetry"}
HEAVY_OPENTELEMETRY = ("opentelemetry.sdk", "opentelemetry.exporter")
ALSO_ALLOWED = {"kvcache/testing": {"pytest"}}

MAX_LINES = 400
MACHINE_PATH = re.compile(rb"(?<![\w.~$-])/(?:home|root|tmp|work|workspace|Users)/[\w.-]+(?=/)")


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    """The files that lie in `folders` themselves; rglob does not follow the links to the rooms."""
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def room_of(name: str) -> str | None:
    """The room that holds the module of this dotted name; None for somebody else's module."""
    first, *rest = name.split(".")
    if first != "kvcache":
        return None
    return rest[0] if rest and rest[0] in ROOMS else "kvcache"


class Imports(ast.NodeVisitor):
    """Collects (line, dotted name, run when the module is imported) of each import in a file."""

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
        rooms = "|".join(ROOMS[1:])
        if isinstance(node.value, str) and re.fullmatch(rf"kvcache\.({rooms})[\w.:]*", node.value):
            self.found.append((node.lineno, node.value.replace(":", "."), False))

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self._later(*node.body)
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._later(*ast.iter_child_nodes(node))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._later(*ast.iter_child_nodes(node))

    def _later(self, *nodes: ast.AST) -> None:
        before, self.at_import = self.at_import, False
        for node in nodes:
            self.visit(node)
        self.at_import = before


def imports_out_of_order(root: Path) -> list[str]:
    """Say, for each import under `root` that breaks the order, where it is and what it breaks."""
    complaints = []
    for path in python_files(root, *ROOMS):
        file = path.relative_to(root).as_posix()
        room, *rest = path.relative_to(root).with_suffix("").parts
        package = ["kvcache"] if room == "kvcache" else ["kvcache", room]
        imports = Imports(package + rest[:-1])
        imports.visit(ast.parse(path.read_text(encoding="utf-8"), file))
        for line, name, at_import in imports.found:
            why = why_not(file, room, rest, name, at_import)
            if why:
                complaints.append(f"{file}:{line}: {name}: {why}")
    return complaints


def why_not(file: str, room: str, rest: list[str], name: str, at_import: bool) -> str:
    """Why this file may not import `name`; empty when it may."""
    first, folder = name.partition(".")[0], file.rpartition("/")[0]
    if first in ROOMS[1:]:
        return f"a room is imported as kvcache.{first}"
    target = room_of(name)
    light = target == "kvcache" or (
        first in LIGHT | ALSO_ALLOWED.get(folder, set())
        and not name.startswith(HEAVY_OPENTELEMETRY)
    )
    if ROOF.fullmatch(file):
        return "the roof imports this inside functions only" if at_import and not light else ""
    if room == "kvcache" and target is None and not light:
        return "the core imports the standard library and the OpenTelemetry API"
    if target is not None and ROOMS.index(target) > ROOMS.index(room):
        return f"{room} may not import {target}"
    if room == target == "tiers" and name.split(".")[2:3] != rest[:1]:
        return "tiers do not import each other"
    return ""


def test_imports_run_one_way() -> None:
    assert imports_out_of_order(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("kvcache/stack.py", "import kvcache.tiers.dram", "kvcache may not import tiers"),
        ("kvcache/stack.py", "from kvcache import profiles", "kvcache may not import profiles"),
        ("kvcache/stack.py", "def f(): from . import tiers", "kvcache may not import tiers"),
        ("kvcache/stack.py", "KIND = 'kvcache.tiers.dram:DramTier'", "may not import tiers"),
        ("kvcache/stack.py", "if TYPE_CHECKING: import kvcache.connectors", "may not import conn"),
        ("kvcache/stack.py", "def f(): import torch", "the core imports"),
        ("kvcache/stack.py", "import pytest", "the core imports"),
        ("kvcache/stack.py", "from opentelemetry.sdk import trace", "the core imports"),
        ("kvcache/stack.py", "import tiers", "imported as kvcache.tiers"),
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
def test_an_import_out_of_order_is_found(tmp_path: Path, file: str, source: str, why: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    [complaint] = imports_out_of_order(tmp_path)
    assert complaint.startswith(f"{file}:")
    assert why in complaint


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
def test_an_import_in_order_is_let_be(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert imports_out_of_order(tmp_path) == []


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_room_refuses_its_bare_name(room: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {room}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"ImportError: import kvcache.{room}, not {room}" in done.stderr


def test_importing_the_library_brings_nothing_heavy() -> None:
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


def test_no_file_is_long() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(ROOT, *ROOMS, "tests")
    }
    assert {file: n for file, n in lines.items() if n > MAX_LINES} == {}


def machine_paths(root: Path) -> list[str]:
    """Say, for each path of somebody's machine in what the project holds, where it is."""
    files = [path for kind in ("*.md", "*.toml", "*.yaml", "Makefile") for path in root.glob(kind)]
    for folder in (*ROOMS, "tests", "docs", ".ci", ".github"):
        files += (root / folder).rglob("*")
    return [
        f"{path.relative_to(root)}:{number}: {match[0].decode()}"
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        for match in MACHINE_PATH.finditer(line)
    ]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    assert machine_paths(ROOT) == []


def test_a_place_on_somebodys_machine_is_found(tmp_path: Path) -> None:
    home = Path("/", "home", "someone")
    (tmp_path / "README.md").write_text(f"one\nread it from {home}/models\n")
    assert machine_paths(tmp_path) == [f"README.md:2: {home}"]
