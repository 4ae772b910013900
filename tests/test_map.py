"""The map in docs/index.md names packages, files and methods that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "index.md"
FOLDERS = ("kvcache", "tiers", "profiles", "connectors")


def section(title: str) -> str:
    """The text of the page under one heading."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@cache
def members_of_classes() -> dict[str, set[str]]:
    """Methods and annotated attributes by class, over the shipped source."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    members = found.setdefault(node.name, set())
                    for child in node.body:
                        if isinstance(child, ast.FunctionDef):
                            members.add(child.name)
                        elif isinstance(child, ast.AnnAssign):
                            members.add(ast.unparse(child.target))
    return found


def methods_of_the_path() -> list[str]:
    """Every ``Class.method`` of the diagram."""
    return re.findall(r"\b[A-Z]\w+\.\w+", section("The path of a block").partition("```text")[2])


@pytest.mark.parametrize("name", sorted(set(methods_of_the_path())))
def test_path_of_a_block_names_methods_of_the_source(name: str) -> None:
    owner, _, method = name.partition(".")
    assert method in members_of_classes().get(owner, set())


def test_path_of_a_block_has_an_arrow_for_every_step() -> None:
    assert len(methods_of_the_path()) > 30


def packages() -> set[str]:
    """Folders of the shipped source that have modules."""
    return {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }


def test_map_has_a_line_for_every_package() -> None:
    rows = re.findall(r"(?m)^\| `([\w/]+/)` \|", section("The map"))
    assert len(rows) == len(set(rows))
    # A folder without a line of its own is named in the line of the folder that holds it.
    listed = set(rows)
    for package in sorted(packages() - listed):
        parent, _, name = package.rstrip("/").rpartition("/")
        row = re.search(rf"(?m)^\| `{parent}/` \|.*`{name}/`", section("The map"))
        command = parent == "kvcache/cli"  # "a file or a folder for each command"
        assert row or command, f"{package} is missing from the map"
    assert listed <= packages()


def test_map_names_modules_of_each_package() -> None:
    for package, text in re.findall(r"(?m)^\| `([\w/]+/)` \| (.*) \|$", section("The map")):
        for name in re.findall(r"(?<!\[)`(\w+)/?`", text):
            found = ROOT / package / name
            assert found.is_dir() or found.with_suffix(".py").is_file(), f"{package}{name}"


def test_map_names_files_of_the_tree() -> None:
    paths = re.findall(r"`((?:kvcache|tiers|profiles|connectors)/[\w/]+\.py)`", section("The map"))
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).is_file()] == []
