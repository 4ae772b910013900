"""The files that only GitHub reads are valid, and what they run and name is in this checkout."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.install_engine import ENGINE_VERSION

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(file for file in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config")
MADE = ("dist", "build", ".venv")  # folders that a step before makes

workflows = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def jobs(workflow: Path) -> dict[str, Any]:
    found: dict[str, Any] = load(workflow)["jobs"]
    return found


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(workflow).values():
        yield from job["steps"]


def commands(workflow: Path) -> Iterator[list[str]]:
    """Yield the words of each command of each `run` step."""
    for step in steps(workflow):
        for line in step.get("run", "").splitlines():
            for command in line.split("&&"):
                yield shlex.split(command)


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"(?m)^([a-z]+):", makefile))


def matrix(workflow: str, job: str, key: str) -> list[str]:
    found: list[str] = jobs(GITHUB / "workflows" / workflow)[job]["strategy"]["matrix"][key]
    return found


def assert_schema(schema: str, *files: Path) -> None:
    """Check files against a schema that check-jsonschema carries; it asks no network."""
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        schema,
        *map(str, files),
    ]
    done = subprocess.run(command, text=True, check=False, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_workflows_match_the_schema_of_workflows() -> None:
    assert WORKFLOWS
    assert_schema("vendor.github-workflows", *WORKFLOWS)
    assert_schema("custom.github-workflows-require-timeout", *WORKFLOWS)


def test_issue_templates_match_the_schemas_of_issue_forms() -> None:
    assert FORMS
    assert_schema("vendor.github-issue-forms", *FORMS)
    assert_schema("vendor.github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml")


@workflows
def test_workflow_reads_the_repository_and_nothing_else(workflow: Path) -> None:
    assert load(workflow)["permissions"] == {"contents": "read"}
    for name, job in jobs(workflow).items():
        assert "permissions" not in job, name
    assert "pull_request_target" not in workflow.read_text(encoding="utf-8")


@workflows
def test_workflow_pins_each_action_to_a_commit_and_names_its_version(workflow: Path) -> None:
    lines = [line for line in workflow.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line
    checkouts = [step for step in steps(workflow) if "actions/checkout@" in step.get("uses", "")]
    assert len(checkouts) == len(jobs(workflow))
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@workflows
def test_workflow_run_on_a_newer_commit_of_a_pull_request_replaces_the_older(
    workflow: Path,
) -> None:
    concurrency = load(workflow)["concurrency"]
    assert concurrency["group"] == "${{ github.workflow }}-${{ github.ref }}"
    assert "pull_request" in concurrency["cancel-in-progress"]


@workflows
def test_workflow_runs_only_targets_and_files_that_exist(workflow: Path) -> None:
    found = list(commands(workflow))
    assert found
    for command in found:
        if command[0] == "make":
            targets = {word for word in command[1:] if "=" not in word}
            assert targets, command
            assert targets <= make_targets(), command
        for word in command:
            if "/" in word and not word.startswith(MADE):
                assert (ROOT / word).exists(), command


def test_makefile_names_only_tests_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    paths = set(re.findall(r"\btests(?:/\w+)*(?:\.py)?", makefile))
    assert {"tests/vllm", "tests/e2e"} <= paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@workflows
def test_workflow_is_triggered_by_paths_that_exist(workflow: Path) -> None:
    triggers = load(workflow)[True]  # YAML reads the key `on` as a boolean
    for event in triggers.keys() & {"pull_request", "push"}:
        for path in (triggers[event] or {}).get("paths", []):
            assert (ROOT / path.removesuffix("/**")).exists(), path


def test_lint_workflow_and_pre_commit_run_make_lint() -> None:
    assert ["make", "lint"] in commands(GITHUB / "workflows" / "lint.yml")
    [lint] = [
        hook
        for repo in load(ROOT / ".pre-commit-config.yaml")["repos"]
        for hook in repo["hooks"]
        if hook["id"] == "lint"
    ]
    assert lint["entry"] == "make lint"
    assert lint["pass_filenames"] is False


def test_python_matrix_and_wheels_cover_the_same_versions() -> None:
    pythons = matrix("tests.yml", "check", "python")
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheels = [f"cp{python.replace('.', '')}-manylinux_*" for python in pythons]
    assert tables["tool"]["cibuildwheel"]["build"] == wheels
    assert tables["project"]["requires-python"] == f">={pythons[0]}"


def test_wheel_smoke_test_of_the_configuration_exists() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    words = shlex.split(tables["tool"]["cibuildwheel"]["test-command"])
    files = [word.removeprefix("{project}/") for word in words if word.startswith("{project}/")]
    assert len(files) == 2
    assert all((ROOT / file).is_file() for file in files)


def test_vllm_matrix_has_the_versions_of_make_matrix() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [versions] = re.findall(r"(?m)^ENGINE_VERSIONS := (.*)$", makefile)
    assert matrix("vllm.yml", "vllm", "vllm") == versions.split()


def test_vllm_matrix_begins_with_the_required_version_and_has_the_tested_one() -> None:
    versions = matrix("vllm.yml", "vllm", "vllm")
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [engine] = [
        requirement.removeprefix("vllm>=")
        for requirement in tables["project"]["optional-dependencies"]["engine"]
        if requirement.startswith("vllm")
    ]
    assert versions[0].startswith(f"{engine}.")
    assert ENGINE_VERSION in versions
