"""Acts for an engine whose copies go on beside its steps, as on a GPU, and dawdle."""

from __future__ import annotations

from random import Random
from typing import Any

from kvcache.connectors.transfer import device
from tests.support import reordering_device
from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.engine.one_engine import use_every_page


class Present(reordering_device.ReorderedStream):
    """The stream of an engine on a processor: what it was given is done, and its waits are real."""

    def record(self) -> reordering_device.ReorderedEvent:
        return reordering_device.ReorderedEvent(self.device, at=float(self.device.time))

    def wait_for(self, mark: reordering_device.ReorderedEvent) -> None:
        mark.wait()


class Dawdling(reordering_device.ReorderingDevice):
    """Copies a page now and then when it is asked whether it is ready."""

    def engine_stream(self) -> Present:
        return Present(self)


def copy_beside(engine: Engine) -> None:
    """From the first step on; a layer is worth a call of its own."""
    assert engine.worker.copier is None
    device.MIN_CALL_NBYTES = 1  # type: ignore[misc]
    engine.worker.device = Dawdling(Random(0))


def load_later(engine: Engine) -> None:
    """From now on no load is awaited by the step that it comes with."""
    engine.side.pending_loads.prefers_async = lambda blocks, others: True


def later(engine: Engine) -> dict[str, Any]:
    """Others compute while a load goes on; and it is not for who is gone when it is over."""
    engine.fresh()
    known = prompt("loaded later", 6 * BLOCK + 1)
    right = engine.ask(known, tokens=4)
    engine.evict_own()
    engine.add("waits", known, tokens=4)
    engine.add("computes", prompt("computed meanwhile", 40), tokens=30)
    told: list[str] = []  # who had another token
    while engine.core.has_unfinished_requests():
        told += [output.request_id for output in engine.step()]
    engine.drain()
    engine.evict_own()
    engine.add("gone", known, tokens=4)
    engine.step()
    loading = engine.open_ends()["jobs"]
    engine.abort("gone")
    engine.drain()
    engine.evict_own()
    again = engine.ask(known, tokens=4)
    return {
        "before": told.index("waits"), "loading": loading,
        "right": right["tokens"], "again": [again["tokens"], again["cached"]],
        "ends": engine.open_ends(),
    }  # fmt: skip


def later_fails(engine: Engine) -> dict[str, Any]:
    """A load of a whole prompt that nobody awaits cannot be begun: its request computes."""
    engine.fresh()
    known = prompt("fails later", 6 * BLOCK)
    right = engine.ask(known, tokens=4)
    engine.evict_own()
    with engine.failing("scatter") as calls:
        answer = engine.ask(known, tokens=4)
    engine.evict_own()
    again = engine.ask(known, tokens=4)
    return {
        "loads": calls, "tokens": [answer["tokens"], again["tokens"]], "right": right["tokens"],
        "cached": again["cached"], "ends": engine.open_ends(),
    }  # fmt: skip


def by_layer(engine: Engine) -> list[list[list[int]]]:
    """Of a load, how many layers are there before and after each is asked for, in two steps."""
    engine.fresh()
    known = prompt("loaded by layer", 6 * BLOCK + 1)
    engine.ask(known, tokens=1)
    worker = engine.worker
    seen: list[list[list[int]]] = []
    scatter, reach = worker.copier.scatter, worker.wait_for_layer

    def scattered(*what: Any, **how: Any) -> Any:
        copies.append(scatter(*what, **how))
        return copies[-1]

    def reached(name: str) -> None:
        before = there()
        reach(name)
        seen[-1].append([before, there()])

    def there() -> int:
        return sum(end.at == end.at for copy in copies for end in copy.ends)

    worker.copier.scatter, worker.wait_for_layer = scattered, reached
    try:
        for _ in range(2):
            copies: list[Any] = []
            seen.append([])
            engine.evict_own()
            engine.ask(known, tokens=1)
    finally:
        del worker.copier.scatter, worker.wait_for_layer
    return seen


def unasked(engine: Engine) -> dict[str, Any]:
    """A pass reads a layer that it does not ask for, unlike those before it; so do those after."""
    engine.fresh()
    known = prompt("unasked", 6 * BLOCK + 1)
    right = engine.ask(known, tokens=4)
    engine.evict_own()
    use_every_page(engine)
    engine.evict_own()
    worker = engine.worker
    reach = worker.wait_for_layer
    worker.wait_for_layer = lambda name: None if ".2." in name else reach(name)
    try:
        answers = [engine.ask(known, tokens=4)]
        engine.evict_own()
        answers.append(engine.ask(known, tokens=4))
    finally:
        del worker.wait_for_layer
    return {
        "computed": right["logprobs"], "answered": answers[0]["logprobs"],
        "tokens": [answer["tokens"] for answer in (right, *answers)], "ends": engine.open_ends(),
    }  # fmt: skip


def late(engine: Engine) -> dict[str, Any]:
    """Jobs that have not ended with their step, and slots that are pinned for them."""
    engine.fresh()
    engine.add("late", prompt("late", 6 * BLOCK + 1), tokens=1)
    engine.step()
    going = engine.open_ends()
    engine.drain()
    return {"going": going, "drained": engine.open_ends()}


def locked(engine: Engine) -> dict[str, int]:
    """Bytes of the slab, and how many of them are locked for the device; in the end none are."""
    slab, device = engine.worker._slab, engine.worker.device
    slab.wait_populated()
    locked = {"slab": slab.nbytes, "locked": sum(device.pinned.values())}
    engine.worker.close()
    return locked | {"in the end": sum(device.pinned.values())}
