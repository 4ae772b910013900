"""Scenarios for an engine with asynchronous copies, as on a GPU, on a device that is slow."""

from __future__ import annotations

from random import Random
from typing import Any

from kvcache.connectors.transfer import device
from tests.support import reordering_device
from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.engine.one_engine import use_every_page


class BlockingStream(reordering_device.ReorderedStream):
    """The stream of an engine on a CPU: its work is done when it returns, and its waits block."""

    def record(self) -> reordering_device.ReorderedEvent:
        return reordering_device.ReorderedEvent(self.device, at=float(self.device.time))

    def wait_for(self, mark: reordering_device.ReorderedEvent) -> None:
        mark.wait()


class DawdlingDevice(reordering_device.ReorderingDevice):
    """Copies a page from time to time when the worker polls a mark."""

    def engine_stream(self) -> BlockingStream:
        return BlockingStream(self)


def use_async_copies(engine: Engine) -> None:
    """Copy asynchronously from the first step on, each layer in a call of its own."""
    assert engine.worker_side.copier is None
    device.MIN_CALL_NBYTES = 1  # type: ignore[misc]
    engine.worker_side.device = DawdlingDevice(Random(0))


def defer_all_loads(engine: Engine) -> None:
    """Defer every load from now on: the step that starts it does not wait for it."""
    engine.scheduler_side.pending_loads.prefers_async = lambda blocks, others: True


def deferred_load(engine: Engine) -> dict[str, Any]:
    """Another request computes during a load; then a request is aborted during its load."""
    engine.reset_all_caches()
    known = prompt("loaded later", 6 * BLOCK + 1)
    right = engine.complete(known, tokens=4)
    engine.reset_own_cache()
    engine.add("waits", known, tokens=4)
    engine.add("computes", prompt("computed meanwhile", 40), tokens=30)
    tokens_of: list[str] = []  # for each new token, the request that it belongs to
    while engine.core.has_unfinished_requests():
        tokens_of += [output.request_id for output in engine.step()]
    engine.drain()
    engine.reset_own_cache()
    engine.add("gone", known, tokens=4)
    engine.step()
    loading = engine.open_state()["jobs"]
    engine.abort("gone")
    engine.drain()
    engine.reset_own_cache()
    again = engine.complete(known, tokens=4)
    return {
        "before": tokens_of.index("waits"), "loading": loading,
        "right": right["tokens"], "again": [again["tokens"], again["cached"]],
        "ends": engine.open_state(),
    }  # fmt: skip


def deferred_load_that_fails(engine: Engine) -> dict[str, Any]:
    """A deferred load of a whole prompt fails when it starts: the request computes the prompt."""
    engine.reset_all_caches()
    known = prompt("fails later", 6 * BLOCK)
    right = engine.complete(known, tokens=4)
    engine.reset_own_cache()
    with engine.failing_copies("scatter") as calls:
        answer = engine.complete(known, tokens=4)
    engine.reset_own_cache()
    again = engine.complete(known, tokens=4)
    return {
        "loads": calls, "tokens": [answer["tokens"], again["tokens"]], "right": right["tokens"],
        "cached": again["cached"], "ends": engine.open_state(),
    }  # fmt: skip


def layers_at_each_wait(engine: Engine) -> list[list[list[int]]]:
    """Return, for two loads and each layer, the loaded layers before and after the wait for it."""
    engine.reset_all_caches()
    known = prompt("loaded by layer", 6 * BLOCK + 1)
    engine.complete(known, tokens=1)
    worker = engine.worker_side
    seen: list[list[list[int]]] = []
    scatter, reach = worker.copier.scatter, worker.wait_for_layer

    def scattered(*what: Any, **how: Any) -> Any:
        copies.append(scatter(*what, **how))
        return copies[-1]

    def reached(name: str) -> None:
        before = loaded()
        reach(name)
        seen[-1].append([before, loaded()])

    def loaded() -> int:
        return sum(end.at == end.at for copy in copies for end in copy.ends)

    worker.copier.scatter, worker.wait_for_layer = scattered, reached
    try:
        for _ in range(2):
            copies: list[Any] = []
            seen.append([])
            engine.reset_own_cache()
            engine.complete(known, tokens=1)
    finally:
        del worker.copier.scatter, worker.wait_for_layer
    return seen


def pass_that_skips_a_wait(engine: Engine) -> dict[str, Any]:
    """A forward pass skips the wait for one layer, and so do all passes after it."""
    engine.reset_all_caches()
    known = prompt("unasked", 6 * BLOCK + 1)
    right = engine.complete(known, tokens=4)
    engine.reset_own_cache()
    use_every_page(engine)
    engine.reset_own_cache()
    worker = engine.worker_side
    reach = worker.wait_for_layer
    worker.wait_for_layer = lambda name: None if ".2." in name else reach(name)
    try:
        answers = [engine.complete(known, tokens=4)]
        engine.reset_own_cache()
        answers.append(engine.complete(known, tokens=4))
    finally:
        del worker.wait_for_layer
    return {
        "computed": right["logprobs"], "answered": answers[0]["logprobs"],
        "tokens": [answer["tokens"] for answer in (right, *answers)], "ends": engine.open_state(),
    }  # fmt: skip


def job_that_outlives_its_step(engine: Engine) -> dict[str, Any]:
    """Return the open state after the step that starts a store, and after its copies."""
    engine.reset_all_caches()
    engine.add("late", prompt("late", 6 * BLOCK + 1), tokens=1)
    engine.step()
    going = engine.open_state()
    engine.drain()
    return {"going": going, "drained": engine.open_state()}
