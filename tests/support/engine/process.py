"""One vLLM in a process of its own, and what is played on it.

Two engines do not fit into one process: vLLM's parallel groups stay, and its memory is hard to
free. So `play` forks one for each engine, off a process that has imported vLLM and done nothing
else (`preload.py`): it starts the engine that a `Setup` describes and hands it to one act after
another. An act is a function that takes an `Engine` and returns something that JSON can hold; what
it returned, or the traceback of what it raised, comes back in a `Play`, together with every warning
that kvcache gave while it ran.
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
from tests.support.engine.engine import Engine, Setup

# Of the engine's output, what a failing test shows.
TAIL = 6000
# Makes torch.compile do nothing. With `enforce_eager` vLLM still compiles functions of its sampler.
EAGER = "TORCHDYNAMO_DISABLE"

Act = Callable[[Engine], Any]


@dataclass(frozen=True, slots=True)
class Play:
    """What came of every act, by name, and all that the process printed."""

    acts: dict[str, dict[str, Any]]
    output: str

    def of(self, act: Act, *, warned: bool = False) -> Any:
        """What `act` returned; it must not have raised, and warned only if it was to."""
        outcome = self.acts.get(act.__name__)
        assert outcome is not None, f"{act.__name__} was not played:\n{self.output[-TAIL:]}"
        assert "error" not in outcome, f"{outcome['error']}\n{self.output[-TAIL:]}"
        assert warned == bool(outcome["warnings"]), outcome["warnings"]
        return outcome["value"]

    def warnings(self, act: Act) -> list[str]:
        """What kvcache warned of during `act`."""
        return list(self.acts[act.__name__]["warnings"])


def environment(setup: Setup) -> dict[str, str]:
    """What the engine's process finds: no network, the imports of this one, and the setup's own."""
    ours = ("KVCACHE", "OTEL")
    base = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    base |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",  # two threads that wait for each other crawl on a busy machine
        "VLLM_NO_USAGE_STATS": "1",
        EAGER: "1",
        "HF_HUB_OFFLINE": "1",
    }
    if setup.l1 is not None:
        base |= {"KVCACHE_PROFILE": "l1-only", "KVCACHE__L1__CAPACITY": setup.l1}
    base |= setup.environment
    return {name: value for name, value in base.items() if value}


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.engine.preload"])


@contextmanager
def _replaced_environment(variables: dict[str, str]) -> Iterator[None]:
    """Replace all environment variables; processes that are started inherit these."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_starting = threading.Lock()


def _started(setup: Setup, acts: Sequence[Act], folder: Path) -> BaseProcess:
    common = environment(Setup(setup.checkpoint, setup.blocks))
    del common[EAGER]  # torch would read it when it is imported; some engines compile
    wanted = environment(setup)
    process = _processes.Process(
        target=_run,
        args=(setup, [(act.__module__, act.__name__) for act in acts], folder, wanted),
        name="MainProcess",  # as vLLM's log lines name a process that was started by hand
    )
    # A `-c` script, which the fork server is, would look for modules in the current folder first.
    with _replaced_environment(common | {"PYTHONSAFEPATH": "1"}):
        process.start()
    return process


def play(setup: Setup, acts: Sequence[Act], folder: Path) -> Play:
    """Fork a process, start the engine in it, play `acts`, end it. `folder` is for files."""
    marks.require("engine")
    with _starting:  # threads share the environment
        process = _started(setup, acts, folder)
    process.join()
    output, report = (folder / "output").read_text(), folder / "report.json"
    outcomes = json.loads(report.read_text()) if report.exists() else {}
    if process.exitcode:
        raise AssertionError(f"the engine ended with {process.exitcode}:\n{output[-TAIL:]}")
    return Play(outcomes, output)


class _Heard(logging.Handler):
    """Keeps what kvcache warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _run(
    setup: Setup, acts: list[tuple[str, str]], folder: Path, variables: dict[str, str]
) -> None:
    """Run in the forked process. Variables that vLLM set when it was imported stay."""
    from tests.support.engine import preload

    os.chdir(folder)
    with Path("output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for name in preload.INHERITED - variables.keys():
        os.environ.pop(name, None)
    os.environ.update(variables)
    if EAGER in variables:
        import torch

        torch.compiler.set_stance("force_eager")
    warnings.filterwarnings("error", module=r"kvcache\b")
    heard = _Heard()
    logging.getLogger("kvcache").addHandler(heard)
    outcomes: dict[str, dict[str, Any]] = {}

    def outcome(name: str, work: Callable[[], Any]) -> None:
        try:
            outcomes[name] = {"value": work()}
        except Exception:  # noqa: BLE001 - the test says it
            outcomes[name] = {"error": traceback.format_exc()}
        outcomes[name]["warnings"] = heard.messages[:]
        heard.messages.clear()
        Path("report.json").write_text(json.dumps(outcomes))

    engines: list[Engine] = []
    outcome("starts", lambda: engines.append(Engine(setup)))
    for engine in engines:
        for module, name in acts:
            act = getattr(importlib.import_module(module), name)
            outcome(name, partial(act, engine))
        engine.core.engine_core.shutdown()


def starts(engine: Engine) -> None:
    """Stands for the start: `Play.of` it is what went wrong or was warned of before any act."""
