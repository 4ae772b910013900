"""A hundred thousand blocks pass through a small stack with many faults; nothing is left over.

The test measures every table of every object of the stack by introspection, so that it also finds
a table that is added later and grows with traffic.
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
from typing import Literal, NamedTuple

import pytest

from kvcache import Lease, Match, Stack, metrics
from kvcache.eviction import Eviction
from kvcache.lower.tier import LowerTier
from kvcache.resume import Needs
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tier import Tier
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import COMMON_FAULTS, RARE_FAULTS, DictTier, StoringTier
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest

NBYTES = 64  # of a block
SIDES = (Needs("window", 6), Needs("state"))
SLOTS = 64
LOWER_BLOCKS = 200  # capacity of the lower tier
LONG = 20.0  # the most seconds that the test waits for an event that happens
USERS = 4
ROUNDS = 10
TURNS = 220  # per user and round
INSPECTED = ("kvcache.", "concurrent.futures.")  # modules of the objects to look into
MOSTLY_NO_FAULT = [*[""] * 20, *COMMON_FAULTS]


class SmallTier(DictTier):
    """A tier that evicts its oldest blocks."""

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        stored = super().store(keys, blocks, parent)
        for key in list(self.held)[:-LOWER_BLOCKS]:
            self.held.pop(key, None)
        return stored


class UnrecordedTier(StoringTier):
    """A faulty tier that forgets its calls."""

    def _begin_call(self, method: str) -> None:
        super()._begin_call(method)
        self.calls.clear()
        self.read.clear()


class Options(NamedTuple):
    """Options of the stack."""

    eviction: str = "lru"
    writes: Literal["all", "hot"] = "all"
    lookup: Literal["ask", "load"] = "ask"


class Traffic:
    """Users that continue each other's chats, on one stack.

    Args:
        options: of the stack.
        inner: the lower tier.
        turns: per user and round.
    """

    def __init__(self, options: Options, inner: Tier, turns: int = TURNS) -> None:
        capacity = Size(SLOTS * PAGE)
        self.front = DramTier(
            block_nbytes=NBYTES, capacity=capacity, eviction=Eviction(options.eviction)
        )
        self.inner = inner
        self.tier = UnrecordedTier(inner)
        self.turns = turns
        self.lower = LowerTier(
            self.tier,
            name="l2",
            front=self.front,
            namespace=b"n" * 32,
            deadline_s=LONG,
            writes=options.writes,
            lookup=options.lookup,
            # A clock of its own, so that the circuit breaker closes however fast the test runs.
            clock=itertools.count(0, 0.02).__next__,
        )
        self.lower.channel.blocks_per_call = 4
        self.lower.channel.remembered.limit = SLOTS
        self.stack = Stack(self.front, [self.lower], profile="test")
        self.chats = [(0, 1)] * 12  # name and turns so far of each chat
        self.names = itertools.count(1)
        self.cleared_blocks = 0

    def round(self, number: int) -> None:
        """Run the turns of every user, then a call that is late, and sometimes a clear."""
        with ThreadPoolExecutor(USERS) as pool:
            list(pool.map(self.user, [f"{number}/{user}" for user in range(USERS)]))
        self.tier.fault = ""
        assert self.stack.flush(LONG)
        self.miss_a_deadline(keys_of(f"late {number}", 3))
        assert self.stack.stats().pinned_slots == 0
        self.front.index.check()
        if number % 3 == 2:
            self.cleared_blocks += self.stack.stats().tiers[0].used_blocks
            self.stack.clear()

    def user(self, seed: str) -> None:
        choose = random.Random(seed)
        prefetches: list[Future[Match]] = []
        for _ in range(self.turns):
            at = choose.randrange(len(self.chats))
            name, turns = self.chats[at]
            self.chats[at] = (name, turns + 1) if turns < 6 else (next(self.names), 1)
            keys = keys_of(f"chat {name}", 5 * turns)
            self.tier.fault = choose.choice([*MOSTLY_NO_FAULT, choose.choice(RARE_FAULTS)])
            if choose.random() < 0.5 and (prefetch := self.stack.prefetch(keys)) is not None:
                prefetches.append(prefetch)
                if choose.random() < 0.5:
                    prefetch.result(LONG)
            if choose.random() < 0.2:
                self.use_groups(f"groups {name}", 2 * turns, prefetches)
            with self.fetch(keys, wait=choose.random() < 0.5) as lease:
                have = len(lease)
                if have and choose.random() < 0.02:
                    lease.end(failed=[choose.choice(lease.keys)])
            filling = self.stack.reserve(keys[have:], keys[have - 1] if have else None)
            for key, view in zip(filling.keys, filling.views, strict=True):
                view[:] = block_of(key, NBYTES)
            if choose.random() < 0.3:
                assert self.stack.flush(LONG)  # otherwise the queue would always be full
            filling.end(failed=[key for key in filling.keys if choose.random() < 0.02])
        assert not wait(prefetches, LONG).not_done

    def use_groups(self, name: str, blocks: int, prefetches: list[Future[Match]]) -> None:
        """Load and store the blocks of a model with a window and states."""
        request, tokens = GroupedRequest(*SIDES, name=name), blocks * BLOCK_TOKENS
        if prefetch := self.stack.prefetch_resume(request.groups, tokens, BLOCK_TOKENS):
            prefetches.append(prefetch)
        found = self.stack.fetch_resume(request.groups, 0, tokens, BLOCK_TOKENS)
        with found.lease as lease:
            for key, view in zip(lease.keys, lease.views, strict=True):
                assert view == block_of(key, NBYTES), "wrong bytes"
        first = found.tokens // BLOCK_TOKENS
        with self.stack.reserve_branches(*request.branches(first, blocks)) as filling:
            for key, view in zip(filling.keys, filling.views, strict=True):
                view[:] = block_of(key, NBYTES)

    def fetch(self, keys: list[bytes], *, wait: bool) -> Lease:
        if wait:
            lease = self.stack.fetch(self.stack.match(keys).result(LONG)).result(LONG)
        else:
            lease = self.stack.fetch_local(keys)
        assert list(lease.keys) == keys[: len(lease)]
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, NBYTES), "wrong bytes"
        return lease

    def miss_a_deadline(self, keys: list[bytes]) -> None:
        """Fetch until a call hangs beyond its deadline, then let it end."""
        self.lower.channel.deadline_s = 0.01
        self.tier.gate.clear()
        for _ in range(5000):  # the call may be cancelled first, or the breaker be open
            self.stack.fetch(Match(keys, 0, 3, (1, 1, 1))).result(LONG).end()
            if self.tier.waiting.acquire(blocking=False):
                break
        else:
            pytest.fail("the stack no longer calls the tier")
        self.tier.gate.set()
        self.lower.channel.deadline_s = LONG
        all_idle = threading.Barrier(1 + len(self.lower.channel.workers.threads))

        def arrive() -> None:
            all_idle.wait(LONG)

        for _ in self.lower.channel.workers.threads:
            self.lower.channel.workers.add_job(0, arrive)
        arrive()  # every worker has finished its earlier jobs


def tables(owner: object, name: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Yield name and size of every table of ``owner`` and, recursively, of its attributes."""
    if isinstance(owner, dict | list | set | deque):
        yield name, len(owner)
    elif isinstance(owner, Queue | SimpleQueue):
        yield name, owner.qsize()
    elif isinstance(owner, tuple):
        for at, each in enumerate(owner):
            yield from tables(each, f"{name}.{at}", seen)
    elif type(owner).__module__.startswith(INSPECTED) and id(owner) not in seen:
        seen.add(id(owner))
        slots = {
            key: getattr(owner, key, None)
            for base in type(owner).__mro__
            for key, member in vars(base).items()
            # compiled classes have the second kind
            if isinstance(member, MemberDescriptorType | GetSetDescriptorType) and key[:2] != "__"
        }
        for key, value in (slots | getattr(owner, "__dict__", {})).items():
            yield from tables(value, f"{name}.{key}", seen)


@pytest.mark.parametrize(
    "options", [Options(), Options("s3fifo", "hot"), Options(lookup="load")], ids=str
)
def test_hundred_thousand_blocks_leave_no_growing_table(
    options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "kvcache")  # spares keeping a thousand warnings in memory
    threads = set(threading.enumerate())
    traffic = Traffic(options, SmallTier())
    stack = traffic.stack
    for number in range(ROUNDS // 2):
        traffic.round(number)
    tracemalloc.start()
    for number in range(ROUNDS // 2, ROUNDS):
        traffic.round(number)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    [l1], [l2] = stack.stats().tiers, stack.stats().lower
    assert l1.stored_blocks >= 100_000
    assert all((l1.failed_blocks, l1.declined_blocks, l1.dropped_blocks))
    assert all((l2.declined_blocks, l2.dropped_blocks))
    assert (l2.missed_blocks > 0) == (options.lookup == "ask")
    assert (l2.withheld_blocks > 0) == (options.writes == "hot")
    check_nothing_is_left(traffic)
    # Measured: the first half leaves 400 KiB, the second one 120 KiB.
    assert grown < 256 << 10, "bytes that the second half left"

    stack.close()
    assert set(threading.enumerate()) <= threads


def check_nothing_is_left(traffic: Traffic) -> None:
    """Check that the counters of an idle stack add up, and that no table has grown."""
    stack = traffic.stack
    stats = stack.stats()
    [l1], [l2] = stats.tiers, stats.lower
    for count in (
        l1.hit_blocks, l1.evicted_blocks, l2.loaded_blocks, l2.stored_blocks, l2.known_blocks,
        l2.lookup_blocks, l2.errors,
    ):  # fmt: skip
        assert count, stats

    assert stats.pinned_slots == 0
    traffic.front.index.check()
    removed = l1.evicted_blocks + l1.dropped_blocks + traffic.cleared_blocks
    assert l1.used_blocks == l1.stored_blocks - removed
    offered = l2.stored_blocks + l2.known_blocks + l2.declined_blocks + l2.dropped_blocks
    assert offered + l2.withheld_blocks == l1.stored_blocks - l2.loaded_blocks
    if traffic.lower.channel.assumes_held:
        assert (l2.hit_blocks, l2.missed_blocks) == (l2.loaded_blocks, 0)

    sizes = dict(tables(stack, "stack", set()))
    in_flight = (
        "stack.lower.reads.in_flight",
        "stack.lower.tiers.0.channel.workers._jobs",
        "stack.lower._waiters._jobs",
        "stack.front.index.segments.filling",
    )
    assert [sizes[name] for name in in_flight] == [0] * 4
    limits = {name: metrics.MAX_UNTAKEN if name.endswith("._untaken") else SLOTS for name in sizes}
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}
    sizes = dict(tables(traffic.inner, "tier", set()))
    assert {name: size for name, size in sizes.items() if size > LOWER_BLOCKS} == {}
