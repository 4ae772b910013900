"""The version is written once, in `kvcache/__init__.py`; everything else repeats it.

tests/test_package.py compares the wheel and its command with the same source.
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import kvcache
from kvcache import cli

ROOT = Path(__file__).resolve().parent.parent


def test_version_option_prints_the_version_and_ends_with_code_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(["--version"])
    assert ending.value.code == 0
    assert capsys.readouterr().out == f"kvcache {kvcache.__version__}\n"


def test_installed_metadata_has_the_version_of_the_source() -> None:
    assert metadata.version("kvcache") == kvcache.__version__


def test_project_table_takes_the_version_from_the_source() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in tables["project"]
    assert tables["project"]["dynamic"] == ["version"]
    assert tables["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kvcache.__version__"}


def test_image_tags_in_docs_have_the_version_of_the_source() -> None:
    files = [file for file in (ROOT / "docs").rglob("*") if file.suffix not in {".png", ".svg"}]
    tags = {
        tag
        for file in files
        if file.is_file()
        for tag in re.findall(r"vllm-kvcache:([\w.]+\w)", file.read_text(encoding="utf-8"))
    }
    assert tags == {kvcache.__version__}
