"""The learned policy is at least LRU, whatever the traffic, up to a little noise.

Each of these has once caught a mistake: a last octave without an end (stretched times), a table
that outlived its traffic (flips), a prefix that ranked below what continues it (orphans), trust in
what was learned where it is wrong by turns (traps, turns).
"""

from functools import cache

import pytest

from kvcache.eviction import POLICIES, Gittins, Lru
from tests.support.eviction_traffic import GENERATORS, Replay, Request, belady, chat, stretched

SLACK = 0.2  # points
COUNT = 2400
STEP = 4  # blocks per engine step


@cache
def made(name: str) -> list[Request]:
    return GENERATORS[name](COUNT)


def hits(policy: str, requests: list[Request], slots: int) -> float:
    return Replay(POLICIES[policy], slots, STEP).play(requests)


@pytest.mark.parametrize("slots", [100, 300, 1000])
@pytest.mark.parametrize("name", GENERATORS)
def test_never_below_lru(name: str, slots: int) -> None:
    learned, plain = hits("gittins", made(name), slots), hits("lru", made(name), slots)
    assert learned >= plain - SLACK
    assert learned <= belady(made(name), slots, 0)


@pytest.mark.parametrize("factor", [0.001, 0.03, 10])
@pytest.mark.parametrize("name", ["chat", "agents", "documents"])
def test_time_stretched(name: str, factor: float) -> None:
    requests = stretched(made(name), factor)
    for slots in (300, 1000):
        assert hits("gittins", requests, slots) >= hits("lru", requests, slots) - SLACK


def test_what_lru_cannot_do() -> None:
    assert hits("lru", made("cycle"), 300) == 0
    assert hits("gittins", made("cycle"), 300) > 0.7 * belady(made("cycle"), 300, 0)


def test_prefix_hits_are_block_hits() -> None:
    """What is held of a chain is its head: nothing is held that cannot be found."""
    replay = Replay(Gittins, 300, STEP)
    held = 0
    for request in chat(1000):
        held += sum(key in replay.index for key in request.keys)
        replay.play([request])
    assert replay.index.hit_blocks >= 0.99 * held > 0


@pytest.mark.parametrize("weeks", [1, 2.9, 20])
def test_after_weeks_of_silence(weeks: float) -> None:
    """Nobody is immortal: what is known is as old as the last octave, or older than all of them."""
    week = weeks * 7 * 86400.0
    requests = [
        *chat(1000),
        *(Request(week + request.time, request.keys) for request in chat(1000, seed=1)),
    ]
    learned, plain = Replay(Gittins, 300), Replay(Lru, 300)
    assert learned.play(requests) >= plain.play(requests) - SLACK
