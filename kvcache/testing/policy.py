"""What an eviction policy promises, as tests.

Always true: the policy is told what an index tells one, by an index or in its order, under a clock
that the test moves; the traffic is the same each time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from random import Random

from kvcache.eviction import Policy
from kvcache.index import Index
from kvcache.testing.blocks import keys_of


def evict_blocks(
    policy: Policy, count: int = 100, stays: Callable[[bytes], bool] = lambda _: False
) -> list[bytes]:
    """Have ``count`` blocks of a policy go, none that ``stays``, and give them in this order."""
    gone: list[bytes] = []
    offers = 0

    def take(keys: Sequence[bytes]) -> int:
        nonlocal offers
        offers += 1
        assert offers < 10_000, "blocks that stay are offered without end"
        before = len(gone)
        for key in reversed(keys):
            if len(gone) == count or stays(key):
                break
            gone.append(key)
        return len(gone) - before

    policy.evict(count, take)
    return gone


class PolicyTests:
    """Set ``policy`` to the class under test."""

    policy: type[Policy]

    def held(self, names: str, capacity: int = 8) -> tuple[Policy, dict[str, list[bytes]]]:
        """A policy that knows a chain of three blocks for each letter, and their keys."""
        policy = self.policy(capacity)
        chains = {name: keys_of(name, 3) for name in names}
        for now, chain in enumerate(chains.values()):
            policy.access(chain, 0, float(now))
            policy.add(chain, None, float(now))
        return policy, chains

    def traffic(self, requests: int, seed: int = 0) -> Iterator[tuple[float, list[bytes]]]:
        """Chains that share heads, some asked for again, and when."""
        draw, now = Random(seed), 0.0
        for number in range(requests):
            now += draw.expovariate(1.0)
            name = f"{number if draw.random() < 0.5 else draw.randrange(1 + number)}"
            head = f"head {len(name) % 3}"
            yield now, [*keys_of(head, 2), *keys_of(name, draw.randint(1, 6))]

    def test_what_is_held_leaves_once(self) -> None:
        policy, chains = self.held("ab")
        assert sorted(evict_blocks(policy)) == sorted([*chains["a"], *chains["b"]])
        assert evict_blocks(policy) == []

    def test_a_block_without_a_request_is_held_as_well(self) -> None:
        policy, chains = self.held("a")
        more = keys_of("answer", 2)
        policy.add(more[:1], chains["a"][-1], 1.0)
        policy.add(more[1:], more[0], 2.0)
        policy.add(keys_of("found", 1), None, 3.0)
        assert set(evict_blocks(policy)) == {*chains["a"], *more, *keys_of("found", 1)}

    def test_what_left_can_come_back(self) -> None:
        policy, chains = self.held("a")
        for now in range(1, 4):
            assert sorted(evict_blocks(policy)) == sorted(chains["a"])
            policy.access(chains["a"], 0, float(now))
            policy.add(chains["a"], None, float(now))
        assert sorted(evict_blocks(policy)) == sorted(chains["a"])

    def test_what_is_asked_for_in_vain_is_not_held(self) -> None:
        policy, chains = self.held("a")
        policy.access(keys_of("not there", 4), 0, 1.0)
        policy.access([*chains["a"], *keys_of("neither", 4)], 3, 2.0)
        assert sorted(evict_blocks(policy)) == sorted(chains["a"])

    def test_what_is_kept_stays(self) -> None:
        policy, chains = self.held("abc")
        tail = chains["b"][-1]
        left = evict_blocks(policy, stays=lambda key: key == tail)
        assert tail not in left
        assert {*chains["a"], *chains["c"]} <= set(left)
        assert tail in evict_blocks(policy)

    def test_when_all_is_kept_there_is_an_end(self) -> None:
        policy, _ = self.held("abc")
        assert evict_blocks(policy, stays=lambda _: True) == []
        assert len(evict_blocks(policy)) == 9

    def test_an_answer_cut_short_forgets_what_was_given(self) -> None:
        policy, chains = self.held("abc")
        some = evict_blocks(policy, 4)
        rest = evict_blocks(policy)
        assert len(some) == 4
        assert sorted(some + rest) == sorted(key for chain in chains.values() for key in chain)

    def test_what_is_removed_does_not_leave_again(self) -> None:
        policy, chains = self.held("abc")
        policy.remove([chains["a"][1], *chains["b"]])
        assert sorted(evict_blocks(policy)) == sorted([*chains["a"][::2], *chains["c"]])

    def test_an_answer_about_slots_is_a_number_of_blocks(self) -> None:
        policy, _ = self.held("abc", capacity=9)
        for count in range(1, 20):
            assert 0 <= policy.admit(keys_of(f"new {count}", count), None, float(count)) <= count

    def test_an_index_stays_sound(self) -> None:
        """Under pins, engine steps of a few blocks, drops; and a chain loses its tail first."""
        now, draw = 0.0, Random(1)
        index = Index(self.policy(40), lambda: now)
        index.open_slots(40)
        pinned: list[int] = []
        for now, chain in self.traffic(400):  # noqa: B007 - the clock reads it
            found = index.access(chain, 0)
            index.unpin(pinned)
            pinned = index.pin(chain[: draw.randint(0, found)])
            for at in range(found, len(chain), 2):
                parent = chain[at - 1] if at else None
                index.publish(index.reserve(chain[at : at + 2], parent)[1])
            there = [key in index for key in chain]
            assert sorted(there, reverse=True) == there, "a block left before what continues it"
            index.check()
            if draw.random() < 0.05:
                index.drop(chain[-1:])
        assert index.hit_blocks > 0
        index.clear()
        index.unpin(pinned)
        assert evict_blocks(index._policy) == []

    def test_the_same_traffic_has_the_same_answers(self) -> None:
        assert self.left(self.traffic(300)) == self.left(self.traffic(300))

    def left(self, traffic: Iterator[tuple[float, Sequence[bytes]]]) -> list[bytes]:
        """What left a tier of 30 blocks, in order."""
        policy = self.policy(30)
        left, held = list[bytes](), set[bytes]()
        for now, chain in traffic:
            found = next((at for at, key in enumerate(chain) if key not in held), len(chain))
            policy.access(chain, found, now)
            absent = [key for key in chain[found:] if key not in held]
            if not absent:
                continue
            if (need := len(held) + len(absent) - 30) > 0:
                policy.admit(absent, chain[found - 1] if found else None, now)
                gone = evict_blocks(policy, need, set(chain).__contains__)
                left += gone
                held.difference_update(gone)
            absent = absent[: 30 - len(held)]
            if absent:
                policy.add(absent, chain[found - 1] if found else None, now)
                held.update(absent)
        return left

    def test_the_state_is_bounded(self) -> None:
        """A hundred thousand blocks pass through ten slots: the second half adds nothing."""
        policy, used = self.policy(10), list[int]()
        index = Index(policy, iter(range(10**9)).__next__)
        index.open_slots(10)
        for number in range(10_000):
            chain = [b"%d/%d" % (number, at) for at in range(10)]
            index.access(chain, 0)
            index.publish(index.reserve(chain, None)[1])
            if number in (5000, 9999):
                gc.collect()
                used.append(sys.getallocatedblocks())
        assert used[1] < used[0] + 5000
