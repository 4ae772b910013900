"""Runs scenarios on an engine in a process of its own.

Two engines do not fit into one process: vLLM's parallel groups stay, and its memory is hard to
free. `run_scenarios` forks a process for each engine, from a fork server that has imported vLLM and
done nothing else (`preload.py`). The process starts the engine and passes it to one scenario after
another.

A scenario is a function that takes an `Engine` and returns a value that JSON can represent. An
`EngineRun` holds the value of each scenario, or the traceback of its exception, and the warnings
that kvcache logged meanwhile.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support import marks
from tests.support.engine.engine import Engine, EngineSettings
from tests.support.engine.without_torchvision import stub_torchvision

TAIL = 6000
"""Characters of an engine's output that a failing test shows."""

EAGER = "TORCHDYNAMO_DISABLE"
"""Turns torch.compile off. With `enforce_eager` vLLM still compiles functions of its sampler."""

Scenario = Callable[[Engine], Any]


@dataclass(frozen=True, slots=True)
class EngineRun:
    """The outcome of every scenario, by name, and the output of the engine's process."""

    outcomes: dict[str, dict[str, Any]]
    output: str

    def result_of(self, scenario: Scenario, *, warned: bool = False) -> Any:
        """Return the value of `scenario`.

        Fails if the scenario raised, or if kvcache logged a warning and `warned` is false, or
        logged none and it is true.
        """
        name = scenario.__name__
        outcome = self.outcomes.get(name)
        assert outcome is not None, f"{name} did not run:\n{self.output[-TAIL:]}"
        assert "error" not in outcome, f"{outcome['error']}\n{self.output[-TAIL:]}"
        assert warned == bool(outcome["warnings"]), outcome["warnings"]
        return outcome["value"]

    def warnings_of(self, scenario: Scenario) -> list[str]:
        """Return the warnings that kvcache logged during `scenario`."""
        return list(self.outcomes[scenario.__name__]["warnings"])


def startup(engine: Engine) -> None:
    """Stands for the start of the engine, before the first scenario, in an `EngineRun`."""


def environment(settings: EngineSettings) -> dict[str, str]:
    """Return the variables of an engine's process: no network, and the import path of this one."""
    from kvcache.connectors.vllm.vllm_names import FIXED_HASH_SEED, has_name

    removed = ("KVCACHE", "OTEL")
    base = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    base |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",  # threads that spin for each other crawl on a busy machine
        EAGER: "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not has_name(FIXED_HASH_SEED):
        base["PYTHONHASHSEED"] = "0"  # else vLLM's hashes differ between processes
    if settings.l1 is not None:
        base |= {"KVCACHE_PROFILE": "l1-only", "KVCACHE__L1__CAPACITY": settings.l1}
    base |= settings.environment
    return {name: value for name, value in base.items() if value}


def run_scenarios(
    settings: EngineSettings, scenarios: Sequence[Scenario], folder: Path
) -> EngineRun:
    """Start an engine in a new process, run `scenarios` on it, and end it.

    The process writes its files to `folder`. Raises AssertionError if it exits with an error.
    """
    marks.require("engine")
    with _starting:
        process = _start(settings, scenarios, folder)
    process.join()
    return read_report(folder, process.exitcode)


def read_report(folder: Path, exit_code: int | None) -> EngineRun:
    """Return the report of an engine's process that wrote its files to `folder`.

    Raises AssertionError if it exited with an error.
    """
    output, report = (folder / "output").read_text(), folder / "report.json"
    outcomes = json.loads(report.read_text()) if report.exists() else {}
    if exit_code:
        raise AssertionError(f"the engine exited with {exit_code}:\n{output[-TAIL:]}")
    return EngineRun(outcomes, output)


def names_of(scenarios: Sequence[Scenario]) -> list[tuple[str, str]]:
    """Return the module and the name of each scenario, as `run_here` takes them."""
    return [(each.__module__, each.__name__) for each in scenarios]


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.engine.preload"])
_starting = threading.Lock()
"""Held while `os.environ` is replaced, since threads share it."""


def _start(settings: EngineSettings, scenarios: Sequence[Scenario], folder: Path) -> BaseProcess:
    variables = environment(settings)
    process = _processes.Process(
        target=run_here,
        args=(
            settings,
            names_of(scenarios),
            folder,
            variables,
        ),
        name="MainProcess",  # as in the log lines of a vLLM that a user starts
    )
    # The first start also starts the fork server. It needs variables that libraries read when they
    # are imported, but not EAGER, since some engines compile. Its `-c` would put the current folder
    # first in the import path.
    common = environment(EngineSettings(settings.checkpoint, settings.blocks))
    del common[EAGER]
    with _replaced_environment(common | {"PYTHONSAFEPATH": "1"}):
        process.start()
    return process


@contextmanager
def _replaced_environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _WarningRecorder(logging.Handler):
    """Keeps the messages of warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run_here(
    settings: EngineSettings,
    scenarios: Sequence[Sequence[str]],
    folder: Path,
    variables: dict[str, str],
) -> None:
    """Run scenarios, given by module and name, on an engine in this process, and write the report.

    It is the only work of the process. Variables that vLLM set when it was imported stay.
    """
    from tests.support.engine import preload

    os.chdir(folder)
    with Path("output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for name in preload.INHERITED - variables.keys():
        os.environ.pop(name, None)
    os.environ.update(variables)
    if EAGER in variables:  # torch, already imported, does not read it again
        import torch

        torch.compiler.set_stance("force_eager")
    if settings.stub_torchvision:
        stub_torchvision()
    warnings.filterwarnings("error", module=r"kvcache\b")
    recorder = _WarningRecorder()
    logging.getLogger("kvcache").addHandler(recorder)
    outcomes: dict[str, dict[str, Any]] = {}

    def record(name: str, work: Callable[[], Any]) -> None:
        try:
            outcomes[name] = {"value": work()}
        except Exception:  # noqa: BLE001 - the test reports it
            outcomes[name] = {"error": traceback.format_exc()}
        outcomes[name]["warnings"] = recorder.messages[:]
        recorder.messages.clear()
        Path("report.json").write_text(json.dumps(outcomes))

    engines: list[Engine] = []
    record(startup.__name__, lambda: engines.append(Engine(settings)))
    for engine in engines:
        for module, name in scenarios:
            scenario = getattr(importlib.import_module(module), name)
            record(name, partial(scenario, engine))
        engine.core.engine_core.shutdown()
