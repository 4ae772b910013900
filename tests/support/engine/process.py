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
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

from tests.support import marks

BLOCK = 32  # tokens
VOCABULARY = 1000
CONNECTOR = {
    "kv_connector": "KVCacheConnector",
    "kv_connector_module_path": "kvcache.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
# Of the engine's output, what a failing test shows.
TAIL = 6000
# Makes torch.compile do nothing. With `enforce_eager` vLLM still compiles functions of its sampler.
EAGER = "TORCHDYNAMO_DISABLE"

Act = Callable[["Engine"], Any]
Answer = dict[str, Any]  # tokens, logprobs (per token, its best three), cached (prompt tokens)


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine: `blocks` of its own cache, `l1` for kvcache (a size), None for no connector."""

    checkpoint: str
    blocks: int
    l1: str | None = None
    budget: int = 256  # tokens of a step
    context: int = 1024
    options: dict[str, Any] = field(default_factory=dict)  # of vllm.LLM
    environment: dict[str, str] = field(default_factory=dict)


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


class Engine:
    """A running vLLM. With its core in this process, `scheduler` and `side` are within reach."""

    def __init__(self, setup: Setup) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.setup = setup
        connector = {"kv_transfer_config": KVTransferConfig(**CONNECTOR)} if setup.l1 else {}
        settings: dict[str, Any] = {
            "model": setup.checkpoint,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": setup.context,
            "max_num_batched_tokens": setup.budget,
            "num_gpu_blocks_override": setup.blocks,
            "kv_cache_memory_bytes": 64 << 20,  # what is allocated is `blocks`
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        self.llm = LLM(**settings | connector | setup.options)
        self.core = self.llm.llm_engine
        self._asked = 0

    # Inside

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.core.engine_core.engine_core.scheduler

    @property
    def keeps(self) -> bool:
        """Whether kvcache is connected."""
        return self.setup.l1 is not None

    @property
    def copying(self) -> bool:
        """Whether copies go on that only another step hears of; elsewhere vLLM steps by itself."""
        here = hasattr(self.core.engine_core, "engine_core")
        return here and self.keeps and bool(self.side.copying)

    @property
    def side(self) -> Any:
        """The connector's half in the scheduler; the first one's of a MultiConnector."""
        connector = self.scheduler.connector
        [connector, *_] = getattr(connector, "sub_connectors", [connector])
        return connector._scheduler

    @property
    def worker(self) -> Any:
        """The connector's half in the worker, where that is this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @property
    def l1(self) -> Any:
        """Counts of the DRAM tier."""
        return self.side.stats().tiers[0]

    def held(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` L1 holds."""
        return list(self.side._stack.front.contains(keys))

    def request(self, name: str) -> Any:
        """The scheduler's request of this name, while it is there."""
        [found] = [
            request for key, request in self.scheduler.requests.items() if key.startswith(name)
        ]
        return found

    def blocks(self, name: str) -> list[int]:
        """The numbers of the engine's blocks that a request has."""
        internal = self.request(name).request_id
        return list(self.scheduler.kv_cache_manager.get_block_ids(internal)[0])

    def page(self, layer: int, block: int) -> bytes:
        """The bytes of one page, read from vLLM's own tensor."""
        import torch

        worker = self.core.engine_core.engine_core.model_executor.driver_worker.worker
        page = worker.model_runner.kv_caches[layer][block].contiguous()
        return bytes(page.view(torch.uint8).numpy().tobytes())

    @property
    def layers(self) -> int:
        worker = self.core.engine_core.engine_core.model_executor.driver_worker.worker
        return len(worker.model_runner.kv_caches)

    def open_ends(self) -> dict[str, int]:
        """What must be nothing when no request is left."""
        side = self.side
        tables = {
            "promised": len(side._promised),
            "running": len(side._running),
            "jobs": len(side._jobs),
            "loads": len(side._loads),
        }
        return tables | {"pinned": self.l1.pinned_slots}

    def metric(self, name: str) -> float:
        """A counter of vLLM, as its users see it."""
        found = [metric for metric in self.llm.get_metrics() if metric.name == name]
        return float(sum(metric.value for metric in found))

    # Requests

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        tokens: int = 8,
        salt: str | None = None,
        lora: str | None = None,
    ) -> None:
        """Queue a request for exactly `tokens` greedy tokens; `lora` is an adapter's folder."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        greedy = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=3, detokenize=False
        )
        salted = {"cache_salt": salt} if salt else {}
        adapter = LoRARequest(Path(lora).name, 1, lora) if lora else None
        asked = {"prompt_token_ids": list(prompt), **salted}
        self.core.add_request(name, asked, greedy, lora_request=adapter)

    def step(self) -> list[Any]:
        """One step of the engine; the outputs that came of it."""
        return list(self.core.step())

    def drain(self) -> dict[str, Answer]:
        """Step until no request is left, and no copy goes on; the answers by name."""
        answers: dict[str, Answer] = {}
        while self.core.has_unfinished_requests() or self.copying:
            for output in self.step():
                if output.finished:
                    answers[output.request_id] = _answer(output)
        return answers

    def abort(self, name: str) -> None:
        self.core.abort_request([name])

    def together(
        self, prompts: Sequence[Sequence[int]], tokens: int = 8, **whose: str | None
    ) -> list[Answer]:
        """Ask all `prompts` at once, of one `salt` or `lora`."""
        names = []
        for prompt in prompts:
            self._asked += 1
            names.append(f"asked{self._asked}")
            self.add(names[-1], prompt, tokens, **whose)
        answers = self.drain()
        return [answers[name] for name in names]

    def ask(self, prompt: Sequence[int], tokens: int = 8, **whose: str | None) -> Answer:
        """Ask one prompt alone."""
        [answer] = self.together([prompt], tokens, **whose)
        return answer

    # Caches

    def fresh(self) -> None:
        """No request, nothing in any cache."""
        assert not self.core.has_unfinished_requests()
        assert self.llm.reset_prefix_cache(reset_connector=True)

    def evict_own(self) -> None:
        """Empty the engine's own cache, where kvcache has what was in it."""
        if self.keeps:
            assert self.llm.reset_prefix_cache()

    @contextmanager
    def failing(self, copy: str, times: int = 1) -> Iterator[list[int]]:
        """The next `times` copies of this kind (`gather` or `scatter`) raise; counts the calls."""
        copier = self.worker.copier
        original = getattr(copier, copy)
        calls: list[int] = []

        def fails(*arguments: Any, **options: Any) -> Any:
            calls.append(len(arguments[0]))
            if len(calls) <= times:
                raise OSError("a copy that fails on purpose")
            return original(*arguments, **options)

        setattr(copier, copy, fails)
        try:
            yield calls
        finally:
            delattr(copier, copy)


def prompt(name: str, length: int) -> list[int]:
    """The `length` tokens of this name: others for every name, the same in every process."""
    random = Random(name)
    return [random.randrange(VOCABULARY) for _ in range(length)]


def _answer(output: Any) -> Answer:
    [completion] = output.outputs
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            sorted([token, entry.logprob] for token, entry in position.items())
            for position in completion.logprobs
        ],
        "cached": output.num_cached_tokens,
    }


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
