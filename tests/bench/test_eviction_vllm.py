"""Compares the index and its policies with vLLM's offloading manager on one trace, in turns.

Both do the bookkeeping of a request without copies: the look-up, a lease on the blocks to load,
eviction, and slots for the absent blocks. The cost leaves out vLLM's scheduler, which also tracks
the position of each key and collects events.
"""

from __future__ import annotations

from functools import cache, partial

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvcache.eviction import POLICIES
from tests.support.bookkeeping_cost import Serve, asked, in_turns
from tests.support.eviction_traffic import Replay, with_conversation

pytestmark = [pytest.mark.bench, with_conversation]


def serve_with_kvcache(policy: str, slots: int) -> Serve:
    replay, requests = Replay(POLICIES[policy], slots), asked()
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


@cache
def vllm_keys() -> list[list[OffloadKey]]:
    return [[make_offload_key(key, 0) for key in request.keys] for request in asked()]


def serve_with_vllm(policy: str, slots: int) -> Serve:
    manager, keys_of = CPUOffloadingManager(slots, policy), vllm_keys()

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
    makers = {
        "`gittins`": partial(serve_with_kvcache, "gittins", slots),
        "`lru`": partial(serve_with_kvcache, "lru", slots),
        "vLLM's LRU": partial(serve_with_vllm, "lru", slots),
        "vLLM's ARC": partial(serve_with_vllm, "arc", slots),
    }
    costs = in_turns(makers, rounds=3)
    print()
    for name, cost in costs.items():
        per_request = f"{cost.p99:.0f} | {cost.most:.0f}"
        print(f"| {name} | {slots} | {cost.hit_ratio:.1f} | {cost.each:.1f} | {per_request} |")
    gittins, lru, vllm_lru, vllm_arc = costs.values()
    assert abs(lru.hit_ratio - vllm_lru.hit_ratio) < 0.1, "the two served different requests"
    assert gittins.hit_ratio > max(vllm_lru.hit_ratio, vllm_arc.hit_ratio)
    assert gittins.each < min(vllm_lru.each, vllm_arc.each)
    assert lru.each < vllm_lru.each / 2
