"""What applies to every test: environment, generated cases, marks, and order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvcache import telemetry
from tests.support import marks

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

with suppress(ImportError):  # the tests on a GPU need few packages; see test_gpu_collection.py
    from hypothesis import settings

    # The duration of a case depends on the machine more than on the code, so cases have no
    # deadline. Cases are the same in every run, so a failure is due to a change;
    # HYPOTHESIS_SEARCH=1 looks for new ones.
    settings.register_profile(
        "kvcache", deadline=None, derandomize="HYPOTHESIS_SEARCH" not in os.environ
    )
    settings.load_profile("kvcache")

VLLM_FOLDERS = {"vllm", "e2e"}
"""Every test in these folders imports vLLM (7 s) or starts it, and is marked so."""

SERVER_MODULES = {"mooncake_pool", "redis_servers", "s3_server"}
"""Modules of tests/support that start a server."""

SLOW_FIRST = ("wheel", "engine", "server")
"""Workers of pytest-xdist take files in this order, so that short files fill the end of a run."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import vLLM, nor what the tests on a GPU lack, for tests that are deselected."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    deselected = "not engine" in config.option.markexpr
    return True if deselected and collection_path.name in VLLM_FOLDERS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the users of servers, refuse unmarked users of vLLM, and put slow files first."""
    for item in items:
        if isinstance(item, pytest.Function) and SERVER_MODULES & vars(item.module).keys():
            item.add_marker("server")
        if item.path.parent.name in VLLM_FOLDERS:
            marked = [*item.iter_markers("engine"), *item.iter_markers("viewer")]
            assert marked, f"{item.nodeid}: mark it `engine`, as it needs vLLM"
    ranks: dict[Path, int] = {}
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        rank = min((SLOW_FIRST.index(name) for name in names.intersection(SLOW_FIRST)), default=99)
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave one core to each worker: threads of torch that spin for each other take several."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let `marks.require` see the marks of the test that runs."""
    with marks.of(item):
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_the_shell() -> Iterator[None]:
    """Remove the variables of kvcache and AIBrix that the shell has set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("KVCACHE", "AIBRIX_KV_CACHE_OL_", "VLLM_AIBRIX_")):
                patch.delenv(name)
        yield


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Install an SDK, as an application does; return the exporter that holds the ended spans."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", provider.get_tracer("kvcache"))
    return exporter
