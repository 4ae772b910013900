"""The table of docs/eviction.md: hit ratio and cost of every policy on the conversation trace.

The cost of a request is that of the index and the policy: look-up, eviction, and slots for the
absent blocks.
"""

import functools
import gc
import tracemalloc

import pytest

from kvcache.eviction import POLICIES
from tests.support.bookkeeping_cost import Serve, asked, in_turns
from tests.support.eviction_traffic import Replay, belady, conversation, with_conversation

pytestmark = [pytest.mark.bench, with_conversation]
SLOTS = (1000, 3000, 5000, 10_000, 20_000, 30_000, 50_000)
BARS = dict(zip(SLOTS, (8.0, 13.8, 17.5, 23.9, 31.2, 34.6, 0.0), strict=True))
SHARES = dict(zip(SLOTS, (0.24, 0.24, 0.24, 0.12, 0.0, 0.0, 0.0), strict=True))


@pytest.mark.parametrize("partial", [True, False])
def test_hit_ratio_of_gittins_reaches_its_bars(partial: bool) -> None:
    requests = conversation(partial=partial)
    half = len(requests) // 2
    found: dict[str, list[float]] = {}
    for name, policy in POLICIES.items():
        for slots in SLOTS:
            replay = Replay(policy, slots)
            replay.play(requests[:half])
            found.setdefault(name, []).append(replay.play(requests[half:]))
    best = [belady(requests, slots, half) for slots in SLOTS]
    print("\nall blocks" if partial else "\nfull blocks only")
    print(f"| policy | {' | '.join(map(str, SLOTS))} |")
    for name, ratios in [*found.items(), ("Belady", best)]:
        print(f"| `{name}` | {' | '.join(f'{ratio:.1f}' for ratio in ratios)} |")
    rows = zip(SLOTS, found["gittins"], found["lru"], best, strict=True)
    for slots, ours, lru, most in rows:
        assert ours >= lru - 0.2
        assert ours >= (BARS[slots] if partial else lru + SHARES[slots] * (most - lru))


def serving(policy: str, slots: int) -> Serve:
    replay, requests = Replay(POLICIES[policy], slots), asked()

    def serve(number: int) -> int:
        request = requests[number]
        replay.now = request.time
        return replay.serve(request.keys)

    return serve


@pytest.mark.parametrize("slots", [1000, 10_000, 20_000, 50_000])
def test_cost_of_each_policy_stays_within_its_bar(slots: int) -> None:
    makers = {name: functools.partial(serving, name, slots) for name in POLICIES}
    costs = in_turns(makers, rounds=5)
    print()
    for name, cost in costs.items():
        per_block = f"{cost.each:.2f} | {cost.each / costs['lru'].each:.2f}"
        per_request = f"{cost.p50:.0f} | {cost.p99:.0f} | {cost.most:.0f}"
        print(f"| `{name}` | {slots} | {per_block} | {per_request} |")
    assert costs["gittins"].each <= 2  # compiled
    for cost in costs.values():
        assert cost.each <= 2 * costs["lru"].each
        assert cost.each <= 3
        assert cost.p99 <= 1000
        assert cost.most <= 5000


@pytest.mark.parametrize("slots", [1000, 10_000])
@pytest.mark.parametrize("name", POLICIES)
def test_state_of_each_policy_takes_at_most_400_bytes_per_key(name: str, slots: int) -> None:
    """Measure the memory that is freed with the policy; the trace holds the keys too."""
    requests = conversation(partial=False)
    tracemalloc.start()
    replay = Replay(POLICIES[name], slots)
    replay.play(requests)
    gc.collect()
    most = tracemalloc.get_traced_memory()[0]
    known_keys: dict[bytes, int] = getattr(replay.policy, "run_ids", replay.index.ready())
    known = len(known_keys)
    del known_keys, replay
    gc.collect()
    replay = Replay(POLICIES["lru"], slots)
    replay.play(requests)
    gc.collect()
    lru = tracemalloc.get_traced_memory()[0]
    replay.index.policy = replay.policy = POLICIES["lru"](1)
    gc.collect()
    index = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    used = most - index
    print(f"\n| `{name}` | {slots} | {known} | {used / known:.0f} | {used / slots:.0f} |")
    assert lru >= index
    assert used / known <= 400
