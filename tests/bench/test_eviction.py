"""The table of docs/eviction.md: every policy on the conversation trace, hit ratio and cost.

Costs are for all that the index and the policy do for a request: look-up, and room and slots for
what is absent.
"""

import gc
import time
import tracemalloc

import pytest

from kvcache.eviction import POLICIES
from tests.core.traffic import Replay, belady, conversation, with_conversation

pytestmark = [pytest.mark.bench, with_conversation]
BAR_US = 2.0  # per block, of the default policy
SLOTS = (1000, 3000, 5000, 10_000, 20_000, 30_000, 50_000)
BARS = dict(zip(SLOTS, (8.0, 13.8, 17.5, 23.9, 31.2, 34.6, 0.0), strict=True))
SHARES = dict(zip(SLOTS, (0.24, 0.24, 0.24, 0.12, 0.0, 0.0, 0.0), strict=True))


@pytest.mark.parametrize("partial", [True, False])
def test_hit_ratios(partial: bool) -> None:
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


@pytest.mark.parametrize("slots", [1000, 10_000, 20_000, 50_000])
def test_cost(slots: int) -> None:
    """Five runs of each policy, in turns. The mean is of the best of each request, so that what
    neighbours take is left out; pauses are those of one run, the fastest, with all that was in it.
    """
    requests = conversation(partial=False)
    half = len(requests) // 2
    blocks = sum(len(request.keys) for request in requests[half:])
    runs: dict[str, list[list[float]]] = {name: [] for name in POLICIES}
    gc.collect()
    gc.freeze()
    for _ in range(5):
        for name, policy in POLICIES.items():
            replay, took = Replay(policy, slots), []
            replay.play(requests[:half])
            gc.collect()  # the replay before this one, which is no pause of this one's
            for request in requests[half:]:
                replay.now = request.time
                start = time.perf_counter()
                replay.serve(request.keys)
                took.append(time.perf_counter() - start)
            runs[name].append(took)
    gc.unfreeze()
    least = {name: sum(map(min, *took)) for name, took in runs.items()}
    print()
    for name in POLICIES:
        fastest = sorted(min(runs[name], key=sum))
        p50, p99, most = (1e6 * fastest[int(part * (len(fastest) - 1))] for part in (0.5, 0.99, 1))
        each, ratio = 1e6 * least[name] / blocks, least[name] / least["lru"]
        cost = f"{each:.2f} | {ratio:.2f} | {p50:.0f} | {p99:.0f} | {most:.0f}"
        print(f"| `{name}` | {slots} | {cost} |")
        assert ratio <= 2
        assert p99 <= 1000
        assert most <= 5000
    each, lru = (1e6 * least[name] / blocks for name in ("gittins", "lru"))
    if each > BAR_US:
        pytest.xfail(f"missed: {each:.2f} us per block, of {BAR_US}; lru takes {lru:.2f} here")


@pytest.mark.parametrize("slots", [1000, 10_000])
@pytest.mark.parametrize("name", POLICIES)
def test_state(name: str, slots: int) -> None:
    """What goes when the policy goes: without the keys, which the trace has as well."""
    requests = conversation(partial=False)
    tracemalloc.start()
    replay = Replay(POLICIES[name], slots)
    replay.play(requests)
    gc.collect()
    most = tracemalloc.get_traced_memory()[0]
    runs: dict[bytes, object] = getattr(replay.policy, "_runs", replay.index._ready)
    known = len(runs)
    del runs, replay
    gc.collect()
    replay = Replay(POLICIES["lru"], slots)
    replay.play(requests)
    gc.collect()
    lru = tracemalloc.get_traced_memory()[0]
    replay.index._policy = replay.policy = POLICIES["lru"](1)
    gc.collect()
    index = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    used = most - index
    print(f"\n| `{name}` | {slots} | {known} | {used / known:.0f} | {used / slots:.0f} |")
    assert lru >= index
    assert used / known <= 400
