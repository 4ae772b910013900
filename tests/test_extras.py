"""Each extra of the package has its place in the docs, also one that no module imports."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = TABLES["project"]["optional-dependencies"]
FOR_DEVELOPERS = {"docs", "test"}
SHIPPED = [
    file
    for folder in ("kvcache", "tiers", "profiles", "connectors")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
LAYOUTS = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
SECTION = LAYOUTS.partition("\n## Attention over restored pages\n")[2].partition("\n## ")[0]
KERNELS = {"flash-attn": "flash_attn", "xformers": "xformers"}
"""The module that each extra with an attention kernel installs."""

kernels = pytest.mark.parametrize("extra", KERNELS)


def test_quick_start_lists_every_extra() -> None:
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    listed = page.partition("The extras are ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == EXTRAS.keys() - FOR_DEVELOPERS


@kernels
def test_kernel_extra_has_an_install_line_and_a_call_on_the_page(extra: str) -> None:
    assert EXTRAS[extra] == [extra]
    assert re.search(rf"pip install '\.\[torch,{extra}\]'", SECTION)
    assert f'find_spec("{KERNELS[extra]}")' in SECTION
    assert re.search(rf"(?m)^    from {KERNELS[extra]}\b", SECTION)


@kernels
def test_kernel_extra_has_a_test_that_runs_the_kernel(extra: str) -> None:
    source = (ROOT / "tests" / "connectors" / "test_layouts_gpu.py").read_text(encoding="utf-8")
    assert f'importorskip("{KERNELS[extra]}' in source


@kernels
def test_only_the_selftest_imports_a_kernel_as_the_page_says(extra: str) -> None:
    assert "nothing else in kvcache imports them" in SECTION
    imports = re.compile(rf"(?m)^\s*(?:import|from) {KERNELS[extra]}\b")
    found = [file for file in SHIPPED if imports.search(file.read_text(encoding="utf-8"))]
    assert [file.relative_to(ROOT).as_posix() for file in found] == [
        "kvcache/cli/selftest/kernels.py"
    ]
