"""docs/public-api.md agrees with the code: names, commands, formats, supported versions."""

import ast
import re
import tomllib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

import kvcache
import kvcache.profiles
import kvcache.testing
from kvcache import cli
from tests.install_engine import TORCH

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "public-api.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of each row of the tables under a heading of the page, less head rows."""
    section = re.split(r"(?m)^#+ ", PAGE.partition(f" {heading}\n")[2])[0]
    tables = re.findall(r"(?m)^\|(?:.*\n\|)*.*$", section)
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for table in tables
        for line in table.splitlines()[2:]
    ]


def cells(heading: str, column: int = 0) -> dict[str, str]:
    return {row[0].strip("`"): row[column] for row in rows(heading)}


def help_of(*command: str) -> str:
    """Return what `kvcache COMMAND --help` prints."""
    printed = StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    return printed.getvalue()


def tables() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def matrix(workflow: str, job: str, key: str) -> list[str]:
    text = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    found: list[str] = yaml.safe_load(text)["jobs"][job]["strategy"]["matrix"][key]
    return found


@pytest.mark.parametrize("module", [kvcache, kvcache.profiles, kvcache.testing])
def test_every_exported_name_is_in_the_reference(module: Any) -> None:
    described = set(re.findall(r"(?m)^\.\. auto\w+:: ([\w.]+)$", REFERENCE))
    if module.__name__ not in described:
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        assert names - described == set()


def test_reference_describes_no_private_name() -> None:
    described = re.findall(r"(?m)^\.\. auto\w+:: ([\w.]+)$", REFERENCE)
    assert described
    assert [name for name in described if "._" in name] == []


def test_names_outside_the_reference_exist() -> None:
    names = cells("Names outside the reference")
    assert names
    for name in names:
        module, _, wanted = name.removeprefix("kvcache.").rpartition(".")
        path = ROOT.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        body = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        defined = {node.name for node in body if isinstance(node, ast.ClassDef)}
        imported = {
            alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert wanted in defined | imported, name


def test_command_table_has_every_command() -> None:
    names = [name for name in cells("The command line") if name.startswith("kvcache ")]
    assert names == [f"kvcache {name}" for name in cli.COMMANDS]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_command_and_each_of_its_actions_takes_json(command: str) -> None:
    page = help_of(command)
    actions = re.findall(r"(?m)^    ([a-z]+) ", page) if "ACTION" in page else []
    pages = [help_of(command, action) for action in actions] or [page]
    assert ["--json" in page for page in pages] == [True] * len(pages)


def test_format_versions_are_those_of_the_source() -> None:
    formats = cells("Formats", 1)
    source = "".join(
        file.read_text(encoding="utf-8") for file in sorted((ROOT / "tiers").rglob("*.py"))
    )
    [frame] = re.findall(r"(?m)^VERSION: Final = (\d+)$", source)
    assert formats["frame: a block outside L1"] == f"`{frame}`"
    assert set(re.findall(r'b"(kvcdisk\d+)"', source)) == {
        formats["disk tier: its two files"].strip("`")
    }
    assert set(re.findall(r'"(kvcache:\d+:)', source)) == {formats["keys in Redis"].strip("`")}


def test_supported_versions_are_those_that_workflows_run() -> None:
    supported = cells("Supported versions", 1)
    pythons = matrix("tests.yml", "check", "python")
    engines = matrix("vllm.yml", "vllm", "vllm")
    torch = TORCH.removeprefix("torch==").rpartition(".")[0]
    assert supported["Python"] == ", ".join(pythons)
    assert supported["vLLM"] == ", ".join(version.rpartition(".")[0] for version in engines)
    assert f"({torch})" in supported["torch"]
    assert tables()["project"]["requires-python"] == f">={pythons[0]}"


def test_changelog_follows_the_policy() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"(?m)^### (.*)$", changelog))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
