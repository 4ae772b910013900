"""The names of vLLM that the connector uses: all are listed, and the installed vLLM has them.

The tests of the source find names of vLLM by elimination: imports from vLLM, and attributes that
neither this project nor a library has. If this project has an attribute of the same name, a name of
vLLM is not found.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

pytest.importorskip("vllm")

import prometheus_client
import torch
import vllm
from opentelemetry import trace
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from kvcache.connectors.vllm import KVCacheConnector, vllm_names
from kvcache.connectors.vllm.compat import version_of
from kvcache.connectors.vllm.vllm_names import (
    NEWEST_VLLM,
    OLDEST_VLLM,
    REMOVED_NAMES,
    VLLM_NAMES,
    has_name,
    missing_names,
)

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvcache", "tiers", "profiles", "connectors")
LIBRARIES: tuple[Any, ...] = (
    str, bytes, list, dict, set, tuple, memoryview, object, ImportError, OSError,
    prometheus_client.Counter, prometheus_client.Gauge, torch, torch.Tensor, torch.cpu,
    torch.backends.cpu, trace, trace.Span, FrameType,
)  # fmt: skip
# Attributes of Hugging Face's configs, of loggers, and of any class with fields
OF_OTHERS = {
    "_commit_hash", "auto_map", "to_dict", "to_json_string", "level", "__dataclass_fields__",
    "__struct_fields__",
}  # fmt: skip
CALLS_FOR_A_LAYOUT = "distributed.kv_transfer.kv_connector.utils:get_kv_connector_cache_layout"
NOT_CALLED_BY_VLLM = {"stats"}  # public methods of the connector


def nodes(paths: Iterable[Path]) -> Iterator[ast.AST]:
    for path in paths:
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def connector_files() -> list[Path]:
    files = (ROOT / "connectors" / "vllm").rglob("*.py")
    return [path for path in sorted(files) if path.name != "vllm_names.py"]


def names_of_this_project() -> set[str]:
    """Return the names of all functions, classes, fields and attributes that this project sets."""
    names = set[str]()
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    for node in nodes(files):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        if isinstance(node, (ast.ClassDef, ast.Module)):
            for each in node.body:
                targets = each.targets if isinstance(each, ast.Assign) else []
                targets = [each.target] if isinstance(each, ast.AnnAssign) else targets
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def names_of_the_standard_library(paths: Iterable[Path]) -> set[str]:
    """Return the names of the imported modules of Python, and the attributes of their classes."""
    names = set[str]()
    for node in nodes(paths):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules = [each.name for each in node.names] if isinstance(node, ast.Import) else modules
        for module in modules:
            if module.partition(".")[0] in sys.stdlib_module_names:
                found = vars(import_module(module))
                classes = (each for each in found.values() if isinstance(each, type))
                names |= {*found, *(name for each in classes for name in dir(each))}
    return names


def attributes_of_objects(paths: Iterable[Path]) -> set[str]:
    """Return the attributes that the source reads, with a dot or by `getattr` and `hasattr`."""
    attributes = set[str]()
    for node in nodes(paths):
        if isinstance(node, ast.Attribute):
            attributes.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.args[1] if node.func.id in ("getattr", "hasattr") else None
            if isinstance(name, ast.Constant):
                attributes.add(str(name.value))
    return attributes


LISTED_ATTRIBUTES = {re.split("[:.]", name)[-1] for name in VLLM_NAMES}


def test_connector_imports_only_listed_names() -> None:
    parts = {part for name in VLLM_NAMES for part in re.split("[:.]", name)}
    imported = {
        f"{node.module}:{alias.name}"
        for node in nodes(connector_files())
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    assert {name for name in imported if name.rpartition(":")[2] not in parts} == set()


def test_connector_reads_only_listed_attributes() -> None:
    files = connector_files()
    libraries = {name for library in LIBRARIES for name in dir(library)} | OF_OTHERS
    others = names_of_this_project() | names_of_the_standard_library(files) | libraries
    assert attributes_of_objects(files) - others - LISTED_ATTRIBUTES == set()


def test_connector_overrides_only_listed_methods() -> None:
    overridden = {name for name in vars(KVCacheConnector) if not name.startswith("_")}
    listed = {name.rpartition(".")[2] for name in VLLM_NAMES if "v1.base:" in name}
    assert overridden - listed == NOT_CALLED_BY_VLLM
    base = set(dir(KVConnectorBase_V1)) | set(dir(SupportsHMA))
    assert not NOT_CALLED_BY_VLLM & base


def test_every_listed_name_is_in_the_source_of_the_connector() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in connector_files())
    words = set(re.findall(r"\w+", source))
    unused = {name for name in VLLM_NAMES if re.split("[:.]", name)[-1] not in words}
    assert unused == {CALLS_FOR_A_LAYOUT}


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_vllm_name_exists_from_its_version_on(name: str) -> None:
    version = version_of(vllm.__version__)
    assert version is not None
    until = REMOVED_NAMES.get(name, (99, 0))
    assert has_name(name) == (VLLM_NAMES[name] <= version < until)


@pytest.mark.parametrize(
    "name",
    [
        "no.such.module:name",
        "config:NoClass",
        "v1.kv_cache_interface:KVCacheConfig.no_such_field",
        "v1.request:Request.no_such_attribute",
    ],
)
def test_vllm_name_that_does_not_exist_is_missing(name: str) -> None:
    assert not has_name(name)


def test_oldest_version_is_the_one_that_the_package_requires() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"vllm>={'.'.join(map(str, OLDEST_VLLM))}" in extras["optional-dependencies"]["engine"]


def test_page_has_all_versions_from_the_oldest_to_the_newest() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    table = page.partition("## Supported versions")[2].partition("\n\n* ")[0]
    (major, first), (_, last) = OLDEST_VLLM, NEWEST_VLLM
    found = re.findall(r"(?m)^\| ([\d., ]+?) \|", table)
    versions = [f"{major}.{minor}" for minor in range(first, last + 1)]
    assert ", ".join(found).split(", ") == versions


def test_missing_names_of_the_installed_vllm_are_none() -> None:
    assert missing_names(version_of(vllm.__version__)) == ([], [])


@pytest.mark.parametrize(
    ("name", "newer", "is_needed"),
    [
        ("v1.kv_cache_interface:KVCacheSpec.block_size", False, True),
        ("v1.kv_cache_interface:MambaSpec.tp_replicated", False, None),
        ("v1.kv_cache_interface:MambaSpec.tp_replicated", True, True),
        ("config:ModelConfig.code_revision", False, None),
        ("config:ModelConfig.code_revision", True, False),
        ("config:ModelConfig.enable_return_routed_experts", True, None),
    ],
)
def test_missing_names_has_those_that_the_version_should_have(
    name: str, newer: bool, is_needed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later names are needed by an untested version, and optional names are only reported."""
    monkeypatch.setattr(vllm_names, "has_name", lambda each: each != name)
    needed, others = missing_names((NEWEST_VLLM[0], NEWEST_VLLM[1] + 1) if newer else NEWEST_VLLM)
    assert (name in needed, name in others) == (is_needed is True, is_needed is False)


def test_missing_names_has_those_of_a_module_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.v1.request")
    monkeypatch.setattr(vllm_names, "find_spec", lambda module: None)
    needed, _ = missing_names(NEWEST_VLLM)
    assert "v1.request:Request.num_tokens" in needed
