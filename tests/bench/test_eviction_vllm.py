"""The index and its policies beside vLLM's own offloading manager: the same trace, in turns.

Both do a request's bookkeeping and move no bytes: they look it up, take a lease on the blocks found
as for a load, make room for the missing blocks and publish them. vLLM's scheduler also keeps the
position of each key and collects events; this is left out.
"""

from __future__ import annotations

from functools import cache, partial

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvcache.eviction import POLICIES
from kvcache.index import Index
from tests.support.bookkeeping_cost import Serve, in_turns, requests
from tests.support.traces import needs_conversation

pytestmark = [pytest.mark.bench, needs_conversation]


def serving_with_index(policy: str, slots: int) -> Serve:
    trace, now = requests(), 0.0
    index = Index(POLICIES[policy](slots), lambda: now)
    index.open_slots(slots)

    def serve(number: int) -> int:
        nonlocal now
        now, keys = trace[number]
        held = index.access(keys, 0)
        if held:
            index.unpin(index.pin(keys[:held]))
        if held < len(keys):
            _, reserved = index.reserve(keys[held:], keys[held - 1] if held else None)
            index.publish(reserved)
        return held

    return serve


@cache
def offload_keys() -> list[list[OffloadKey]]:
    return [[make_offload_key(key, 0) for key in keys] for _, keys in requests()]


def serving_with_vllm(policy: str, slots: int) -> Serve:
    manager, keys_of = CPUOffloadingManager(slots, policy), offload_keys()

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


@pytest.mark.parametrize("slots", [1000, 10_000, 50_000])
def test_gittins_beats_the_policies_of_vllm_in_hits_and_cost(slots: int) -> None:
    contenders = {
        "`gittins`": partial(serving_with_index, "gittins", slots),
        "`lru`": partial(serving_with_index, "lru", slots),
        "vLLM's LRU": partial(serving_with_vllm, "lru", slots),
        "vLLM's ARC": partial(serving_with_vllm, "arc", slots),
    }
    costs = in_turns(contenders, rounds=3)
    print()
    for name, cost in costs.items():
        measured = f"{cost.hit_ratio:.1f} | {cost.us_per_block:.1f}"
        print(f"| {name} | {slots} | {measured} | {cost.p99_us:.0f} | {cost.max_us:.0f} |")
    gittins, lru, vllm_lru, vllm_arc = costs.values()
    assert abs(lru.hit_ratio - vllm_lru.hit_ratio) < 0.1, "they did not serve the same requests"
    assert gittins.hit_ratio > max(vllm_lru.hit_ratio, vllm_arc.hit_ratio)
    assert gittins.us_per_block < min(vllm_lru.us_per_block, vllm_arc.us_per_block)
    assert lru.us_per_block < vllm_lru.us_per_block / 2
