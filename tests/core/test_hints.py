"""Hints order evictions: done goes first, kept goes last, and neither can starve others."""

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


def test_what_is_done_goes_first_its_tail_before_its_head(engine: Engine) -> None:
    old, new = keys_of("old", 8), keys_of("new", 8)
    engine.put(old)
    engine.put(new)
    engine.index.mark_done(new)
    for gone, key in enumerate(keys_of("more", 8), 1):
        assert engine.put([key]) == 1
        assert [key in engine.index for key in new] == [True] * (8 - gone) + [False] * gone
    assert engine.held(old) == 8


def test_what_others_continue_or_use_again_is_not_done(engine: Engine) -> None:
    head, ours, theirs = keys_of("head", 2), keys_of("ours", 4), keys_of("theirs", 4)
    engine.put(head)
    engine.put(ours, head[-1])
    engine.put(theirs, head[-1])
    again = keys_of("again", 4)
    engine.put(again)
    engine.index.mark_done([*head, *ours])
    engine.index.mark_done(again)
    assert engine.index.access(again, 0) == 4
    engine.put(keys_of("more", 6))  # two were free
    assert engine.held(head) == 2
    assert engine.held(ours) == 0
    assert engine.held(again) == 4


def test_done_while_a_lease_is_out_is_remembered(engine: Engine) -> None:
    keys = keys_of("a", 4)
    engine.put(keys_of("others", 12))
    _, slots = engine.index.reserve(keys, None)
    engine.index.mark_done(keys)
    engine.put(keys_of("meanwhile", 1))  # others go: these are being filled
    engine.index.publish(slots)
    assert engine.held(keys) == 4
    engine.put(keys_of("later", 4))
    assert engine.held(keys) == 0


def test_what_is_kept_goes_last_and_no_longer_than_it_was_said(engine: Engine) -> None:
    keys = keys_of("keep", 4)
    engine.put(keys)
    engine.index.protect(keys, 100.0)
    for turn in range(10):
        engine.put(keys_of(f"others {turn}", 6))
        assert engine.held(keys) == 4
    engine.now += 200
    for turn in range(10):
        engine.put(keys_of(f"more {turn}", 6))
    assert engine.held(keys) == 0 or engine.learns  # which may think more of what is old


def test_under_pressure_what_is_kept_goes_too(engine: Engine) -> None:
    keys = keys_of("keep", 4)
    engine.put(keys)
    engine.index.protect(keys, 1e9)
    engine.put(pinned := keys_of("pinned", 12))
    slots = engine.index.pin(pinned)
    assert len(slots) == 12
    assert engine.put(keys_of("new", 4)) == 4
    assert engine.held(keys) == 0


def test_no_more_than_a_share_is_kept_and_the_rest_is_counted(engine: Engine) -> None:
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
    engine.index.protect(others[:2], 5.0)  # what is over makes room
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
def test_hints_leave_nothing_of_what_is_gone(policy: str, turns: list[tuple[str, str]]) -> None:
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


def test_a_stack_takes_hints(stack: Stack) -> None:
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
        with pytest.raises(ValueError, match=r"(keep|done) is"):
            stack.hint(old, **wrong)  # type: ignore[arg-type]
