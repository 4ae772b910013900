"""The index and its policies beside vLLM's own offloading manager: the same trace, in turns.

Both do a request's bookkeeping and move no bytes: the look-up, a lease on what is there for as long
as it would be loaded, room and slots for what is absent, what to evict for it. vLLM's scheduler
also notes the position of each key and gathers events; that is left out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvcache.eviction import POLICIES
from tests.core.traffic import Replay, conversation, with_conversation

pytestmark = [pytest.mark.bench, with_conversation]
ROUNDS = 3
Serve = Callable[[int], int]  # a request, by its number; how many of its blocks were there


def ours(policy: str, slots: int) -> Serve:
    requests = conversation(partial=False)
    replay = Replay(POLICIES[policy], slots)
    index = replay.index

    def serve(number: int) -> int:
        request = requests[number]
        keys, replay.now = request.keys, request.time
        held = index.access(keys, 0)
        if held:
            index.unpin(index.pin(keys[:held]))
        if held < len(keys):
            _, slots = index.reserve(keys[held:], keys[held - 1] if held else None)
            index.publish(slots)
        return held

    return serve


def theirs(policy: str, slots: int, keys_of: Sequence[list[OffloadKey]]) -> Serve:
    manager = CPUOffloadingManager(slots, policy)

    def serve(number: int) -> int:
        keys, context = keys_of[number], ReqContext(str(number))
        manager.on_new_request(context)
        held = 0
        for key in keys:
            if manager.lookup(key, context) is not LookupResult.HIT:
                break
            held += 1
        if held:
            manager.prepare_load(keys[:held], context)
            manager.complete_load(keys[:held], context)
        if held < len(keys) and (stored := manager.prepare_store(keys[held:], context)):
            manager.complete_store(stored.keys_to_store, context)
        manager.on_request_finished(context)
        return held

    return serve


def played(serve: Serve, requests: range) -> Iterator[tuple[float, int]]:
    """What each took, in seconds, and how many blocks were there."""
    for number in requests:
        start = time.perf_counter()
        held = serve(number)
        yield time.perf_counter() - start, held


@pytest.mark.parametrize("slots", [1000, 10_000, 50_000])
def test_beside_vllm(slots: int) -> None:
    """Mean of the best of each request, after the first half of the trace; one run's pauses."""
    requests = conversation(partial=False)
    half, everything = len(requests) // 2, len(requests)
    blocks = sum(len(request.keys) for request in requests[half:])
    keys_of = [[make_offload_key(key, 0) for key in request.keys] for request in requests]
    makers: dict[str, Callable[[], Serve]] = {
        "`gittins`": lambda: ours("gittins", slots),
        "`lru`": lambda: ours("lru", slots),
        "vLLM's LRU": lambda: theirs("lru", slots, keys_of),
        "vLLM's ARC": lambda: theirs("arc", slots, keys_of),
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in makers}
    hits: dict[str, float] = {}
    gc.collect()
    gc.freeze()
    for _ in range(ROUNDS):
        for name, make in makers.items():
            serve = make()
            for _ in played(serve, range(half)):
                pass
            gc.collect()
            took, held = zip(*played(serve, range(half, everything)), strict=True)
            runs[name].append(list(took))
            hits[name] = 100 * sum(held) / blocks
    gc.unfreeze()
    cost = {name: 1e6 * sum(map(min, *took)) / blocks for name, took in runs.items()}
    print()
    for name, each in cost.items():
        fastest = sorted(min(runs[name], key=sum))
        p99, most = 1e6 * fastest[int(0.99 * (len(fastest) - 1))], 1e6 * fastest[-1]
        print(f"| {name} | {slots} | {hits[name]:.1f} | {each:.1f} | {p99:.0f} | {most:.0f} |")
    assert abs(hits["`lru`"] - hits["vLLM's LRU"]) < 0.1, "they were not asked for the same"
    assert hits["`gittins`"] > max(hits["vLLM's LRU"], hits["vLLM's ARC"])
    assert cost["`gittins`"] < min(cost["vLLM's LRU"], cost["vLLM's ARC"])
    assert cost["`lru`"] < cost["vLLM's LRU"] / 2
