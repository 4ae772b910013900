"""The contract of an eviction policy, as tests.

Invariants: the tests call the policy in the order in which an index does, or through a real index;
the clock is moved by the test; the traffic is the same in each run.
"""

from __future__ import annotations

import gc
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from random import Random

from kvcache.eviction import Policy
from kvcache.index import Index
from kvcache.keys import Branch
from kvcache.testing.blocks import keys_of


def evict_blocks(
    policy: Policy, count: int = 100, pinned: Callable[[bytes], bool] = lambda _: False
) -> list[bytes]:
    """Evict up to ``count`` blocks that are not ``pinned``; returns their keys in order."""
    evicted: list[bytes] = []
    offers = 0

    def take(keys: Sequence[bytes]) -> int:
        nonlocal offers
        offers += 1
        assert offers < 10_000, "pinned blocks are offered without end"
        before = len(evicted)
        for key in reversed(keys):
            if len(evicted) == count or pinned(key):
                break
            evicted.append(key)
        return len(evicted) - before

    policy.evict(count, take)
    return evicted


def store_with_sides(
    index: Index, keys: Sequence[bytes], parent: bytes | None, sides: Sequence[Branch]
) -> None:
    """Store ``keys``, a segment that continues ``parent``, and side blocks of it, as L1 does."""
    positions, slots = index.reserve_branches([(keys, parent)], sides)
    first_side = bisect_left(positions, len(keys))
    index.publish(slots[first_side:] + slots[:first_side])


class PolicyTests:
    """Inherit from this class and set ``policy`` to the class under test."""

    policy: type[Policy]

    def filled(self, names: str, capacity: int = 8) -> tuple[Policy, dict[str, list[bytes]]]:
        """Return a policy that holds a chain of three blocks per letter, and the chains."""
        policy = self.policy(capacity)
        chains = {name: keys_of(name, 3) for name in names}
        for now, chain in enumerate(chains.values()):
            policy.access(chain, 0, float(now))
            policy.add(chain, None, float(now))
        return policy, chains

    def traffic(self, requests: int, seed: int = 0) -> Iterator[tuple[float, list[bytes]]]:
        """Yield times and chains; the chains share heads, and some are requested again."""
        draw, now = Random(seed), 0.0
        for number in range(requests):
            now += draw.expovariate(1.0)
            name = f"{number if draw.random() < 0.5 else draw.randrange(1 + number)}"
            head = f"head {len(name) % 3}"
            yield now, [*keys_of(head, 2), *keys_of(name, draw.randint(1, 6))]

    def test_evict_offers_each_held_block_once(self) -> None:
        policy, chains = self.filled("ab")
        assert sorted(evict_blocks(policy)) == sorted([*chains["a"], *chains["b"]])
        assert evict_blocks(policy) == []

    def test_add_without_access_holds_the_blocks(self) -> None:
        policy, chains = self.filled("a")
        generated = keys_of("answer", 2)
        policy.add(generated[:1], chains["a"][-1], 1.0)
        policy.add(generated[1:], generated[0], 2.0)
        policy.add(keys_of("restored", 1), None, 3.0)
        assert set(evict_blocks(policy)) == {*chains["a"], *generated, *keys_of("restored", 1)}

    def test_add_after_eviction_holds_the_blocks_again(self) -> None:
        policy, chains = self.filled("a")
        for now in range(1, 4):
            assert sorted(evict_blocks(policy)) == sorted(chains["a"])
            policy.access(chains["a"], 0, float(now))
            policy.add(chains["a"], None, float(now))
        assert sorted(evict_blocks(policy)) == sorted(chains["a"])

    def test_access_of_missing_blocks_holds_nothing(self) -> None:
        policy, chains = self.filled("a")
        policy.access(keys_of("missing", 4), 0, 1.0)
        policy.access([*chains["a"], *keys_of("continuation", 4)], 3, 2.0)
        assert sorted(evict_blocks(policy)) == sorted(chains["a"])

    def test_evict_with_a_pinned_tail_keeps_that_block(self) -> None:
        policy, chains = self.filled("abc")
        tail = chains["b"][-1]
        evicted = evict_blocks(policy, pinned=lambda key: key == tail)
        assert tail not in evicted
        assert {*chains["a"], *chains["c"]} <= set(evicted)
        assert tail in evict_blocks(policy)

    def test_evict_with_all_blocks_pinned_returns(self) -> None:
        policy, _ = self.filled("abc")
        assert evict_blocks(policy, pinned=lambda _: True) == []
        assert len(evict_blocks(policy)) == 9

    def test_evict_of_some_blocks_forgets_only_those(self) -> None:
        policy, chains = self.filled("abc")
        first = evict_blocks(policy, 4)
        rest = evict_blocks(policy)
        assert len(first) == 4
        assert sorted(first + rest) == sorted(key for chain in chains.values() for key in chain)

    def test_removed_blocks_are_not_offered(self) -> None:
        policy, chains = self.filled("abc")
        policy.remove([chains["a"][1], *chains["b"]])
        assert sorted(evict_blocks(policy)) == sorted([*chains["a"][::2], *chains["c"]])

    def test_admit_returns_at_most_the_number_of_keys(self) -> None:
        policy, _ = self.filled("abc", capacity=9)
        for count in range(1, 20):
            assert 0 <= policy.admit(keys_of(f"new {count}", count), None, float(count)) <= count

    def test_index_stays_consistent_under_mixed_traffic(self) -> None:
        """With pins, engine steps of two blocks, and drops; a chain loses its tail first."""
        now, draw = 0.0, Random(1)
        policy = self.policy(40)
        index = Index(policy, lambda: now)
        index.open_slots(40)
        pinned: list[int] = []
        for now, chain in self.traffic(400):  # noqa: B007 - the clock reads it
            found = index.access(chain, 0)
            index.unpin(pinned)
            pinned = index.pin(chain[: draw.randint(0, found)])
            for at in range(found, len(chain), 2):
                parent = chain[at - 1] if at else None
                index.publish(index.reserve(chain[at : at + 2], parent)[1])
            held = [key in index for key in chain]
            assert sorted(held, reverse=True) == held, "a block left before its continuation"
            index.check()
            if draw.random() < 0.05:
                index.drop(chain[-1:])
        assert index.hit_blocks > 0
        index.clear()
        index.unpin(pinned)
        assert evict_blocks(policy) == []

    def test_side_blocks_reported_before_their_chain_are_held(self) -> None:
        """Blocks of windows and states: nothing continues them, and their parent comes later."""
        policy = self.policy(16)
        chain = keys_of("chain", 3)
        sides = [keys_of(f"side {at}", 2) for at in range(3)]
        policy.access(chain, 0, 0.0)
        for parent, parts in zip(chain, sides, strict=True):
            policy.add(parts, parent, 0.0)
        policy.add(chain, None, 0.0)
        policy.access(sides[-1], 2, 1.0)
        policy.access(chain, 3, 1.0)
        below = {parent: {*parts} for parent, parts in zip(chain, sides, strict=True)}
        for parent, child in pairwise(chain):
            below[parent].add(child)
        gone = set[bytes]()

        def stays(key: bytes) -> bool:
            if not below.get(key, gone) <= gone:
                return True
            gone.add(key)
            return False

        evicted = list[bytes]()
        while more := evict_blocks(policy, pinned=stays):
            evicted += more
        assert sorted(evicted) == sorted([*chain, *sides[0], *sides[1], *sides[2]])

    def test_index_stays_consistent_with_side_blocks(self) -> None:
        """A chain block leaves after the side block below it, and all blocks can leave."""
        now, draw = 0.0, Random(2)
        index = Index(self.policy(60), lambda: now)
        index.open_slots(60)
        resumed = 0
        for now, chain in self.traffic(400):  # noqa: B007 - the clock reads it
            sides = [[key + b" side", key + b" part"] for key in chain]
            found = index.count_prefix(chain)
            resume = next((at for at in range(found, 0, -1) if sides[at - 1][1] in index), 0)
            if resume:
                resumed += 1
                index.access(sides[resume - 1], 0)
            index.access(chain, 0)
            pinned = index.pin(chain[: draw.randint(0, found)])
            for at in range(resume, len(chain), 2):
                keys, parent = chain[at : at + 2], chain[at - 1] if at else None
                below = list(zip(sides[at : at + 2], keys, strict=True))
                store_with_sides(index, keys, parent, below)
            index.unpin(pinned)
            for key, parts in zip(chain, sides, strict=True):
                assert key in index or not any(part in index for part in parts)
            index.check()
            if draw.random() < 0.05:
                index.drop([key for key in (*sides[-1], chain[-1]) if key in index])
        assert resumed > 0
        index.admission = False
        new = [b"new %d" % at for at in range(60)]
        while new and (reserved := index.reserve(new, None)[0]):
            new = new[len(reserved) :]
        assert not new, "some blocks could not be evicted"

    def test_same_calls_evict_the_same_blocks(self) -> None:
        assert self.replay(self.traffic(300)) == self.replay(self.traffic(300))

    def replay(self, traffic: Iterator[tuple[float, Sequence[bytes]]]) -> list[bytes]:
        """Return the keys that a tier of 30 blocks evicts for ``traffic``, in order."""
        policy = self.policy(30)
        evicted, held = list[bytes](), set[bytes]()
        for now, chain in traffic:
            found = next((at for at, key in enumerate(chain) if key not in held), len(chain))
            policy.access(chain, found, now)
            absent = [key for key in chain[found:] if key not in held]
            if not absent:
                continue
            if (need := len(held) + len(absent) - 30) > 0:
                policy.admit(absent, chain[found - 1] if found else None, now)
                victims = evict_blocks(policy, need, set(chain).__contains__)
                evicted += victims
                held.difference_update(victims)
            absent = absent[: 30 - len(held)]
            if absent:
                policy.add(absent, chain[found - 1] if found else None, now)
                held.update(absent)
        return evicted

    def test_state_is_bounded(self) -> None:
        """A hundred thousand blocks pass through twenty slots; the second half adds no memory."""
        self.require_bounded_state(lambda _: [])

    def test_state_is_bounded_with_side_blocks(self) -> None:
        """The same, with a side block below each block."""
        self.require_bounded_state(lambda chain: [([key + b" side"], key) for key in chain])

    def require_bounded_state(self, sides_of: Callable[[list[bytes]], list[Branch]]) -> None:
        """Store chains of ten blocks, with the side blocks that ``sides_of`` returns."""
        index = Index(self.policy(20), iter(range(10**9)).__next__)
        index.open_slots(20)
        allocated = list[int]()
        for number in range(10_000):
            chain = [b"%d/%d" % (number, at) for at in range(10)]
            index.access(chain, 0)
            store_with_sides(index, chain, None, sides_of(chain))
            if number in (5000, 9999):
                gc.collect()
                allocated.append(sys.getallocatedblocks())
        assert allocated[1] < allocated[0] + 5000
