"""Every state of a slot and every transition, against a model, under every policy."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from kvcache.eviction import POLICIES, Fifo, Lru, Take
from kvcache.index import Index


def index_of(slots: int, policy: str = "lru") -> Index:
    index = Index(POLICIES[policy](slots), map(float, itertools.count()).__next__)
    index.open_slots(slots)
    return index


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def fill(index: Index, names: str, parent: str | None = None) -> int:
    _, slots = index.reserve(keys(names), parent.encode() if parent else None)
    index.publish(slots)
    index.check()
    return len(slots)


def held(index: Index, names: str) -> str:
    return "".join(name for name in names if name.encode() in index)


def test_access_finds_a_block_only_after_publish() -> None:
    index = index_of(2)
    positions, slots = index.reserve(keys("ab"), None)
    assert (positions, slots) == ([0, 1], [0, 1])
    assert index.pin(keys("ab")) == []
    assert index.reserve(keys("ab"), None) == ([], [])
    assert index.access(keys("ab"), 0) == 0
    index.publish(slots)
    assert index.access(keys("ab"), 0) == 2
    assert index.access(keys("abc"), 1) == 1
    assert index.pin(keys("ab")) == slots
    index.check()


def test_publish_with_failed_keys_frees_their_slots() -> None:
    index = index_of(2)
    _, slots = index.reserve(keys("ab"), None)
    index.publish(slots, failed=[b"b"])
    assert held(index, "ab") == "a"
    assert (index.stored_blocks, index.failed_blocks) == (1, 1)
    assert fill(index, "b", "a") == 1


def test_reserve_in_a_full_index_evicts_an_unpinned_block() -> None:
    index = index_of(3)
    fill(index, "a")
    fill(index, "b")
    fill(index, "c")
    pinned = index.pin(keys("a"))
    assert fill(index, "d") == 1
    assert held(index, "abcd") == "acd"
    index.unpin(pinned)
    assert fill(index, "e") == 1  # since its pin, `a` is the newest
    assert held(index, "acde") == "ade"


def test_reserve_with_all_blocks_pinned_declines_the_tail() -> None:
    index = index_of(3)
    fill(index, "ab")
    index.pin(keys("ab"))
    positions, slots = index.reserve(keys("xyz"), None)
    assert positions == [0]
    assert index.declined_blocks == 2
    index.publish(slots)
    index.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_starts_at_the_tail_of_a_chain(policy: str) -> None:
    index = index_of(6, policy)
    fill(index, "ab")
    fill(index, "cd", "b")
    fill(index, "ef", "d")
    for lost, name in enumerate("uvwx", 1):
        fill(index, name)
        kept = held(index, "abcdef")
        assert kept == "abcdef"[: len(kept)], f"a hole after {lost} evictions"


class HeadFirst(Fifo):
    """A policy that ignores prefixes."""

    def evict(self, count: int, take: Take) -> None:
        for key in list(self.run_of):
            if count and take([key]):
                self.remove([key])
                count -= 1


def test_eviction_by_a_head_first_policy_spares_the_head() -> None:
    index = Index(HeadFirst(6), map(float, itertools.count()).__next__)
    index.open_slots(6)
    fill(index, "abc")
    fill(index, "xy")
    for name in "uvw":
        fill(index, name)
        for chain in ("abc", "xy"):
            kept = held(index, chain)
            assert kept == chain[: len(kept)]


@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_of_chains_that_grow_in_turns_starts_at_the_tails(policy: str) -> None:
    index = index_of(8, policy)
    fill(index, "ab")
    fill(index, "mn")
    fill(index, "cd", "b")
    fill(index, "op", "n")
    for name in "uvwxyz":
        fill(index, name)
        for chain in ("abcd", "mnop"):
            kept = held(index, chain)
            assert kept == chain[: len(kept)]


def test_reserve_with_an_absent_parent_evicts_nothing() -> None:
    index = index_of(2)
    fill(index, "ab")
    assert fill(index, "z", "y") == 0
    assert held(index, "ab") == "ab"
    assert index.declined_blocks == 1


def test_reserve_of_a_chain_longer_than_the_index_keeps_its_head() -> None:
    index = index_of(3)
    assert fill(index, "abcde") == 3
    assert fill(index, "de", "c") == 0
    assert held(index, "abcde") == "abc"


def test_reserve_of_a_key_twice_uses_one_slot() -> None:
    index = index_of(4)
    assert fill(index, "aba") == 2
    assert len(index) == 2


def test_drop_of_a_pinned_block_frees_its_slot_at_unpin() -> None:
    index = index_of(2)
    fill(index, "ab")
    slots = index.pin(keys("ab"))
    index.drop([b"b", b"absent"])
    index.check()
    assert held(index, "ab") == "a"
    assert index.reserve(keys("c"), None) == (
        [],
        [],
    )  # `a` is pinned, and the slot of `b` is an orphan
    index.unpin(slots)
    index.check()
    assert fill(index, "c") == 1
    assert index.dropped_blocks == 1


def test_clear_removes_filling_blocks() -> None:
    index = index_of(4)
    fill(index, "ab")
    pinned = index.pin(keys("a"))
    _, filling = index.reserve(keys("c"), b"b")
    index.clear()
    index.check()
    assert len(index) == 0
    assert index.pinned_slots == 2
    index.publish(filling)
    assert held(index, "c") == ""
    index.unpin(pinned)
    index.check()
    assert index.pinned_slots == 0
    assert fill(index, "wxyz") == 4


def test_parent_stored_again_is_protected_by_its_children() -> None:
    index = index_of(3)
    fill(index, "abc")
    index.drop([b"a"])
    fill(index, "a")
    fill(index, "z")
    kept = held(index, "abc")
    assert kept == "ab"


class Failing(Lru):
    """Evicts one block, then raises."""

    def evict(self, count: int, take: Take) -> None:
        super().evict(1, take)
        raise LookupError("a bug")


def test_policy_that_raises_during_evict_costs_no_slot() -> None:
    index = Index(Failing(3), map(float, itertools.count()).__next__)
    index.open_slots(3)
    fill(index, "abc")
    with pytest.raises(LookupError):
        index.reserve(keys("yz"), None)
    index.check()
    assert held(index, "abc") == "ab"
    assert index.evicted_blocks == 1
    assert fill(index, "z") == 1


class PolicyRecorder(Lru):
    """Records its calls; admits ``worth`` blocks of each reserve."""

    def __init__(self, capacity: int, worth: int = 99) -> None:
        super().__init__(capacity)
        self.calls: list[tuple[str, bytes, object]] = []
        self.worth = worth

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        self.calls.append(("access", b"".join(chain), held))
        super().access(chain, held, now)

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        self.calls.append(("admit", b"".join(keys), parent))
        return self.worth

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self.calls.append(("add", b"".join(keys), parent))
        super().add(keys, parent, now)


def test_policy_is_called_with_keys_and_parents() -> None:
    policy = PolicyRecorder(4, worth=1)
    index = Index(policy, map(float, itertools.count()).__next__)
    index.open_slots(4)
    _, slots = index.reserve(keys("abcd"), b"h")
    index.publish(slots, failed=[b"b"])
    index.access(keys("habx"), 1)
    index.access(keys("cdx"), 1)
    assert policy.calls == [
        ("add", b"a", b"h"),
        ("add", b"cd", b"b"),  # `b` failed, so `c` does not continue `a`
        ("access", b"habx", 2),
        ("access", b"cdx", 2),
    ]
    policy.calls.clear()
    assert index.reserve(keys("dxyz"), b"c")[0] == [1]
    assert policy.calls == [("admit", b"xyz", b"d")]
    assert (index.declined_blocks, index.evicted_blocks) == (2, 0)


def test_reserve_evicts_only_as_many_as_needed() -> None:
    index = index_of(5)
    fill(index, "abc")
    fill(index, "xyz")
    assert index.evicted_blocks == 1
    fill(index, "vwv")
    assert index.evicted_blocks == 3


def test_reserve_after_a_filling_parent_gets_room() -> None:
    index = index_of(2)
    fill(index, "x")
    _, slots = index.reserve(keys("a"), None)
    assert fill(index, "b", "a") == 1
    index.publish(slots)
    assert held(index, "abx") == "ab"


def test_access_past_the_end_counts_nothing() -> None:
    index = index_of(2)
    fill(index, "ab")
    assert index.access(keys("ab"), 5) == 0
    assert (index.lookup_blocks, index.hit_blocks) == (0, 0)


class IndexMachine(stateful.RuleBasedStateMachine):
    """Random trees of chains; the model knows the pins and the slots being filled."""

    policy = "lru"
    filling: stateful.Bundle[tuple[list[bytes], list[int]]] = stateful.Bundle("filling")
    reading: stateful.Bundle[list[int]] = stateful.Bundle("reading")

    @stateful.initialize(slots=st.integers(1, 12))
    def open(self, slots: int) -> None:
        self.index = Index(POLICIES[self.policy](12), map(float, itertools.count()).__next__)
        self.index.open_slots(slots)
        self.slots = slots
        self.writing: set[int] = set()
        self.pins: dict[int, int] = {}
        self.cleared = 0

    @stateful.rule(more=st.integers(0, 3))
    def more_memory(self, more: int) -> None:
        self.slots = min(12, self.slots + more)
        self.index.open_slots(self.slots)

    # A chain is a string of digits and its keys are the prefixes, so that chains share heads.
    chains = st.text("01", min_size=1, max_size=7)

    @staticmethod
    def keys(chain: str) -> list[bytes]:
        return [chain[: at + 1].encode() for at in range(len(chain))]

    @stateful.rule(target=filling, chain=chains, skip=st.integers(0, 6))
    def reserve(self, chain: str, skip: int) -> tuple[list[bytes], list[int]]:
        names = self.keys(chain)
        at = min(skip, len(names) - 1)
        before = self.index.ready()
        positions, slots = self.index.reserve(names[at:], names[at - 1] if at else None)
        evicted = before.keys() - self.index.ready()
        assert not any(before[key] in self.pins for key in evicted), "a pinned block was evicted"
        assert not any(key[:-1] in evicted for key in self.index.ready()), (
            "a parent was evicted before its child"
        )
        assert len(set(slots)) == len(slots)
        assert not set(slots) & (self.writing | set(self.pins)), "a slot is lent twice"
        assert all(names[at:][place] not in before for place in positions)
        self.writing |= set(slots)
        return [names[at:][place] for place in positions], slots

    @stateful.rule(
        lease=stateful.consumes(filling), bad=st.integers(0, 7), parts=st.permutations(range(3))
    )
    def publish(self, lease: tuple[list[bytes], list[int]], bad: int, parts: list[int]) -> None:
        names, slots = lease
        failed = names[bad : bad + 1]
        for part in parts:  # in random order
            self.index.publish(slots[2 * part : 2 * part + 2 if part < 2 else None], failed)
        self.writing -= set(slots)
        # After a clear, another lease may hold the key in another slot.
        assert not any(self.index.ready().get(key) in slots for key in failed)

    @stateful.rule(target=reading, chain=chains)
    def pin(self, chain: str) -> list[int]:
        slots = self.index.pin(self.keys(chain))
        for slot in slots:
            self.pins[slot] = self.pins.get(slot, 0) + 1
        return slots

    @stateful.rule(target=reading, chain=chains)
    def pin_any(self, chain: str) -> list[int]:
        names = self.keys(chain)
        held = self.index.ready() | self.index.filling()
        positions, slots = self.index.pin_any(names)
        assert positions == [at for at, key in enumerate(names) if key in held]
        assert slots == [held[names[at]] for at in positions]
        for slot in slots:
            self.pins[slot] = self.pins.get(slot, 0) + 1
        return slots

    @stateful.rule(slots=stateful.consumes(reading))
    def unpin(self, slots: Sequence[int]) -> None:
        self.index.unpin(slots)
        for slot in slots:
            self.pins[slot] -= 1
            if not self.pins[slot]:
                del self.pins[slot]

    @stateful.rule(chain=chains, start=st.integers(0, 7))
    def access(self, chain: str, start: int) -> None:
        names = self.keys(chain)
        start = min(start, len(names))
        found = self.index.access(names, start)
        assert all(key in self.index for key in names[start : start + found])
        assert start + found == len(names) or names[start + found] not in self.index

    @stateful.rule(chain=chains)
    def drop(self, chain: str) -> None:
        self.index.drop(self.keys(chain)[-1:])

    @stateful.rule()
    def clear(self) -> None:
        self.cleared += len(self.index.ready())
        self.index.clear()
        assert len(self.index) == 0

    @stateful.invariant()
    def invariants_hold(self) -> None:
        if not hasattr(self, "index"):
            return
        index = self.index
        index.check()
        assert len(index) <= index.slots == self.slots
        assert index.pinned_slots == len(self.writing | set(self.pins))
        removed = index.evicted_blocks + index.dropped_blocks + self.cleared
        assert index.stored_blocks - removed == len(index.ready())


for name in POLICIES:
    machine: Any = type(f"IndexMachine_{name}", (IndexMachine,), {"policy": name})
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
    globals()[f"Test_{name}"] = machine.TestCase
