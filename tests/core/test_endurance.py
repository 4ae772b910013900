"""A hundred thousand blocks through a small stack, much of it going wrong: nothing is left over.

The tables of every object of the stack are looked through, whatever their names, so that a table
that grows with traffic is found also when it is new.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import tracemalloc
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Queue, SimpleQueue
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Literal

import pytest

from kvcache import Lease, Match, Stack, metrics
from kvcache.eviction import Eviction
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import COMMON_FAULTS, RARE_FAULTS, FaultyTier

NBYTES = 64  # of a block
SLOTS = 64
ROOM = 200  # blocks below
LONG = 20.0  # seconds that a wait lasts at most for what does come
USERS = 4
ROUNDS = 10
TURNS = 220  # of every user in a round
OURS = ("kvcache.", "concurrent.futures.")  # modules whose objects are looked into
WRONG = [*[""] * 20, *COMMON_FAULTS]


class Small(FaultyTier):
    """Forgets the oldest; keeps no record of what it was asked."""

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        stored = super().store(keys, blocks, parent)
        for key in list(self.held)[:-ROOM]:
            self.held.pop(key, None)
        self.calls.clear()
        self.read.clear()
        return stored


class Traffic:
    """Users who continue each other's chats, on one stack."""

    def __init__(self, eviction: str, writes: Literal["all", "hot"]) -> None:
        capacity = Size(SLOTS * PAGE)
        self.front = DramTier(block_nbytes=NBYTES, capacity=capacity, eviction=Eviction(eviction))
        self.tier = Small()
        self.lower = LowerTier(
            self.tier,
            name="l2",
            front=self.front,
            namespace=b"n" * 32,
            deadline_s=LONG,
            writes=writes,
            clock=itertools.count(0, 0.02).__next__,  # so that pauses end, however fast this runs
        )
        self.lower.channel.blocks_per_call = 4
        self.stack = Stack(self.front, [self.lower], profile="test")
        self.chats = [(0, 1)] * 12  # which chat a user talks in, and its turns so far
        self.names = itertools.count(1)
        self.cleared_blocks = 0

    def round(self, number: int) -> None:
        """Every user's turns; a call to the tier below that comes late; now and then a reset."""
        with ThreadPoolExecutor(USERS) as pool:
            list(pool.map(self.user, [f"{number}/{user}" for user in range(USERS)]))
        self.tier.fault = ""
        assert self.stack.flush(LONG)
        self.tier_is_late(keys_of(f"late {number}", 3))
        assert self.stack.stats().pinned_slots == 0
        self.front.index.check()
        if number % 3 == 2:
            self.cleared_blocks += self.stack.stats().tiers[0].used_blocks
            self.stack.clear()

    def user(self, seed: str) -> None:
        choose = random.Random(seed)
        coming: list[Future[Match]] = []
        for _ in range(TURNS):
            at = choose.randrange(len(self.chats))
            name, turns = self.chats[at]
            self.chats[at] = (name, turns + 1) if turns < 6 else (next(self.names), 1)
            keys = keys_of(f"chat {name}", 5 * turns)
            self.tier.fault = choose.choice([*WRONG, choose.choice(RARE_FAULTS)])
            if choose.random() < 0.5 and (bringing := self.stack.prefetch(keys)) is not None:
                coming.append(bringing)
                if choose.random() < 0.5:
                    bringing.result(LONG)
            with self.fetch(keys, wait=choose.random() < 0.5) as lease:
                have = len(lease)
                if have and choose.random() < 0.02:
                    lease.end(failed=[choose.choice(lease.keys)])
            filling = self.stack.reserve(keys[have:], keys[have - 1] if have else None)
            for key, view in zip(filling.keys, filling.views, strict=True):
                view[:] = block_of(key, NBYTES)
            if choose.random() < 0.3:
                assert self.stack.flush(LONG)  # else the queue would be full all the time
            filling.end(failed=[key for key in filling.keys if choose.random() < 0.02])
        assert not wait(coming, LONG).not_done

    def fetch(self, keys: list[bytes], *, wait: bool) -> Lease:
        if wait:
            lease = self.stack.fetch(self.stack.match(keys).result(LONG)).result(LONG)
        else:
            lease = self.stack.fetch_local(keys)
        assert list(lease.keys) == keys[: len(lease)]
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, NBYTES), "wrong bytes"
        return lease

    def tier_is_late(self, keys: list[bytes]) -> None:
        """Fetch until a call hangs and whoever waits has given up; then have the call end."""
        self.lower.channel.deadline_s = 0.01
        self.tier.gate.clear()
        for _ in range(5000):  # it may be given up before it began, or not asked for a while
            self.stack.fetch(Match(keys, 0, 3, (1, 1, 1))).result(LONG).end()
            if self.tier.waiting.acquire(blocking=False):
                break
        else:
            pytest.fail("nobody asks the tier any more")
        self.tier.gate.set()
        self.lower.channel.deadline_s = LONG
        through = threading.Barrier(1 + len(self.lower.channel.workers.threads))

        def arrive() -> None:
            through.wait(LONG)

        for _ in self.lower.channel.workers.threads:
            self.lower.channel.workers.add_job(0, arrive)
        arrive()  # every thread is through with what it was called for before


def tables(owner: object, name: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """How much is in every table of ``owner``, and of the objects of kvcache that it is made of."""
    if isinstance(owner, dict | list | set | deque):
        yield name, len(owner)
    elif isinstance(owner, Queue | SimpleQueue):
        yield name, owner.qsize()
    elif isinstance(owner, tuple):
        for at, each in enumerate(owner):
            yield from tables(each, f"{name}.{at}", seen)
    elif type(owner).__module__.startswith(OURS) and id(owner) not in seen:
        seen.add(id(owner))
        slots = {
            key: getattr(owner, key, None)
            for base in type(owner).__mro__
            for key, its in vars(base).items()
            # the latter where it is compiled
            if isinstance(its, MemberDescriptorType | GetSetDescriptorType) and key[:2] != "__"
        }
        for key, value in (slots | getattr(owner, "__dict__", {})).items():
            yield from tables(value, f"{name}.{key}", seen)


@pytest.mark.parametrize(("eviction", "writes"), [("lru", "all"), ("s3fifo", "hot")])
def test_a_hundred_thousand_blocks_leave_nothing_behind(
    eviction: str,
    writes: Literal["all", "hot"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("CRITICAL", "kvcache")  # a thousand warnings, kept until the test ends
    threads = set(threading.enumerate())
    traffic = Traffic(eviction, writes)
    stack = traffic.stack
    for number in range(ROUNDS // 2):
        traffic.round(number)
    tracemalloc.start()
    for number in range(ROUNDS // 2, ROUNDS):
        traffic.round(number)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    stats = stack.stats()
    [l1], [l2] = stats.tiers, stats.lower
    assert l1.stored_blocks >= 100_000
    for happened in (
        l1.hit_blocks, l1.failed_blocks, l1.evicted_blocks, l1.declined_blocks, l1.dropped_blocks,
        l2.loaded_blocks, l2.missed_blocks, l2.stored_blocks, l2.known_blocks, l2.declined_blocks,
        l2.dropped_blocks, l2.errors,
    ):  # fmt: skip
        assert happened, stats

    assert stats.pinned_slots == 0
    traffic.front.index.check()
    left = l1.evicted_blocks + l1.dropped_blocks + traffic.cleared_blocks
    assert l1.used_blocks == l1.stored_blocks - left
    ways = l2.stored_blocks + l2.known_blocks + l2.declined_blocks + l2.dropped_blocks
    assert ways + l2.withheld_blocks == l1.stored_blocks - l2.loaded_blocks
    assert (l2.withheld_blocks > 0) == (writes == "hot")

    sizes = dict(tables(stack, "stack", set()))
    under_way = (
        "stack.lower.reads_in_flight",
        "stack.lower.tiers.0.channel.workers._jobs",
        "stack.lower._waiters._jobs",
        "stack.front.index.segments.filling",
    )
    assert [sizes[name] for name in under_way] == [0] * 4
    most = {name: metrics.MAX_UNTAKEN if name.endswith("._untaken") else SLOTS for name in sizes}
    assert {name: size for name, size in sizes.items() if size > most[name]} == {}
    assert grown < 256 << 10, "bytes that the second half left"  # it leaves 120 KiB, the first 400

    stack.close()
    assert set(threading.enumerate()) <= threads
