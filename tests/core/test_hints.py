"""Hints order evictions: done blocks first, protected ones last, without starving others."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import Stack
from kvcache.eviction import POLICIES
from kvcache.hints import SLOTS_PER_PROTECTED_BLOCK
from kvcache.index import Index
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tiers.dram import DramTier

SLOTS = 16


class Engine:
    def __init__(self, policy: str) -> None:
        self.now = 0.0
        self.index = Index(POLICIES[policy](SLOTS), lambda: self.now)
        self.index.open_slots(SLOTS)
        self.index.admission = False
        self.learns = policy == "gittins"

    def put(self, keys: list[bytes], parent: bytes | None = None) -> int:
        self.now += 1
        positions, slots = self.index.reserve(keys, parent)
        self.index.publish(slots)
        self.index.check()
        return len(positions)

    def held(self, keys: list[bytes]) -> int:
        return sum(key in self.index for key in keys)


@pytest.fixture(params=sorted(POLICIES))
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


def test_done_blocks_are_evicted_first_from_the_tail(engine: Engine) -> None:
    old, new = keys_of("old", 8), keys_of("new", 8)
    engine.put(old)
    engine.put(new)
    engine.index.mark_done(new)
    for gone, key in enumerate(keys_of("more", 8), 1):
        assert engine.put([key]) == 1
        assert [key in engine.index for key in new] == [True] * (8 - gone) + [False] * gone
    assert engine.held(old) == 8


def test_done_blocks_used_again_or_with_children_stay(engine: Engine) -> None:
    head, done, other = keys_of("head", 2), keys_of("done", 4), keys_of("other", 4)
    engine.put(head)
    engine.put(done, head[-1])
    engine.put(other, head[-1])
    again = keys_of("again", 4)
    engine.put(again)
    engine.index.mark_done([*head, *done])
    engine.index.mark_done(again)
    assert engine.index.access(again, 0) == 4
    engine.put(keys_of("more", 6))  # two slots were free
    assert engine.held(head) == 2
    assert engine.held(done) == 0
    assert engine.held(again) == 4


def test_done_during_a_lease_takes_effect_after_publish(engine: Engine) -> None:
    keys = keys_of("a", 4)
    engine.put(keys_of("others", 12))
    _, slots = engine.index.reserve(keys, None)
    engine.index.mark_done(keys)
    engine.put(keys_of("meanwhile", 1))  # evicts other blocks: these are being filled
    engine.index.publish(slots)
    assert engine.held(keys) == 4
    engine.put(keys_of("later", 4))
    assert engine.held(keys) == 0


def test_protected_blocks_are_evicted_last_until_the_time_ends(engine: Engine) -> None:
    keys = keys_of("keep", 4)
    engine.put(keys)
    engine.index.protect(keys, 100.0)
    for turn in range(10):
        engine.put(keys_of(f"others {turn}", 6))
        assert engine.held(keys) == 4
    engine.now += 200
    for turn in range(10):
        engine.put(keys_of(f"more {turn}", 6))
    assert engine.held(keys) == 0 or engine.learns  # which may rank old blocks higher


def test_protected_blocks_are_evicted_if_all_others_are_pinned(engine: Engine) -> None:
    keys = keys_of("keep", 4)
    engine.put(keys)
    engine.index.protect(keys, 1e9)
    engine.put(pinned := keys_of("pinned", 12))
    slots = engine.index.pin(pinned)
    assert len(slots) == 12
    assert engine.put(keys_of("new", 4)) == 4
    assert engine.held(keys) == 0


def test_protect_beyond_the_share_is_refused_and_counted(engine: Engine) -> None:
    keys = keys_of("greedy", SLOTS)
    engine.put(keys)
    engine.index.protect(keys, 1e9)
    share = SLOTS // SLOTS_PER_PROTECTED_BLOCK
    assert engine.index.hints.refused_blocks == SLOTS - share
    engine.put(keys_of("others", SLOTS - share))
    assert engine.held(keys) == share
    engine.now += 2e9
    others = keys_of("later", SLOTS)
    engine.put(others)
    engine.index.protect(others[:2], 5.0)  # expired protections make room
    assert engine.index.hints.refused_blocks == SLOTS - share


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    turns=st.lists(
        st.tuples(
            st.sampled_from(["put", "done", "keep", "access", "drop"]),
            st.text("ab", min_size=1, max_size=6),
        ),
        max_size=60,
    ),
)
def test_hints_on_removed_blocks_are_discarded(policy: str, turns: list[tuple[str, str]]) -> None:
    engine = Engine(policy)
    for verb, chain in turns:
        keys = [chain[: at + 1].encode() for at in range(len(chain))]
        match verb:
            case "put":
                engine.put(keys)
            case "keep":
                engine.index.protect(keys, 10.0)
            case "access":
                engine.index.access(keys, 0)
            case "done":
                engine.index.mark_done(keys)
            case "drop":
                engine.index.drop(keys)
        engine.index.check()
        hints = engine.index.hints
        assert hints.done_keys | hints.protected_keys <= set(engine.index.ready())
        assert len(hints.protected_keys) <= SLOTS // SLOTS_PER_PROTECTED_BLOCK


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(DramTier(block_nbytes=PAGE, capacity=Size(SLOTS * PAGE)), profile="t") as stack:
        stack.front.slab.wait_populated()
        yield stack


def test_stack_hint_reaches_the_front_tier(stack: Stack) -> None:
    old, new = keys_of("old", 8), keys_of("new", 8)
    stack.reserve(old).end()
    stack.reserve(new).end()
    stack.hint(new, done=True)
    stack.hint(old, keep=60.0)
    stack.hint(old, soon=True)
    assert stack.stats().tiers[0].unkept_blocks == 8 - SLOTS // SLOTS_PER_PROTECTED_BLOCK
    stack.reserve(keys_of("more", 8)).end()
    assert stack.front.contains(old) == [True] * 8
    for wrong in ({"done": True, "keep": 1.0}, {"keep": -1.0}, {"keep": float("nan")}):
        with pytest.raises(ValueError, match=r"^(keep is|done excludes)"):
            stack.hint(old, **wrong)  # type: ignore[arg-type]
