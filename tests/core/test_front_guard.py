"""A failure of a third-party front tier or recorder is a miss or a decline."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache import Lease, Stack
from kvcache.lower.tier import LowerTier
from kvcache.replay.recorder import Recorder
from kvcache.resume import Needs
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, check_resume, put_branches
from tests.support.stack_under_test import LONG
from tests.support.wrong_results import EXCEPTIONS, WRONG_RESULTS, Unusable

EXCEPTION_NAMES = sorted(EXCEPTIONS.keys() - {"KeyboardInterrupt"})  # a Ctrl-C is the application's
LENDING_METHODS = ("reserve", "pin", "pin_any")
OTHER_METHODS = (
    "access", "contains", "count_prefix", "reserve_branches", "stats", "clear", "mark_done",
    "protect", "close",
)  # fmt: skip
METHODS = (*LENDING_METHODS, *OTHER_METHODS)


class ThirdPartyTier(DramTier):
    """A front tier of another package."""


class OpenedStack:
    """A stack over a third-party front tier, with a lower tier."""

    def __init__(self) -> None:
        self.front = ThirdPartyTier(block_nbytes=PAGE, capacity=Size(16 * PAGE))
        self.front.slab.wait_populated()
        self.tier = FaultyTier()
        self.lower = LowerTier(
            self.tier, name="l2", front=self.front, namespace=b"n" * 32, deadline_s=LONG
        )
        self.stack = Stack(self.front, [self.lower], profile="test")

    def use(self) -> None:
        """Call every method that an engine calls."""
        stack = self.stack
        for name in ("a", "b", "c"):
            keys = keys_of(name, 6)
            with stack.fetch(stack.match(keys).result(LONG)).result(LONG) as lease:
                assert list(lease.keys) == keys[: len(lease)]
                for key, view in zip(lease.keys, lease.views, strict=True):
                    assert view == block_of(key, PAGE)
                have = len(lease)
            with stack.reserve(keys[have:], keys[have - 1] if have else None) as lease:
                for key, view in zip(lease.keys, lease.views, strict=True):
                    view[:] = block_of(key, PAGE)
            if prefetch := stack.prefetch(keys):
                prefetch.result(LONG)
            stack.hint(keys, done=True)
            stack.hint(keys, keep=1.0)
            assert stack.flush(LONG)
            stack.stats()
        for name in ("d", "e"):
            request = GroupedRequest(Needs("window", 6), Needs("state"), name=name)
            put_branches(stack, *request.branches(0, 3))
            assert stack.flush(LONG)
            check_resume(stack, request, 0, 3 * BLOCK_TOKENS)
            if prefetch := stack.prefetch_resume(request.groups, 3 * BLOCK_TOKENS, BLOCK_TOKENS):
                prefetch.result(LONG)
            stack.hint_resume(request.groups, 3 * BLOCK_TOKENS, keep=1.0)
            stack.hint_resume(request.groups, 3 * BLOCK_TOKENS, done=True)
        stack.clear()

    def check_works(self) -> None:
        """Check that the stack stores and finds blocks, with no slot pinned."""
        self.use()
        keys = keys_of("after", 4)
        with self.stack.reserve(keys) as lease:
            assert list(lease.keys) == keys
        with self.stack.fetch_local(keys) as lease:
            assert list(lease.keys) == keys
        assert self.stack.flush(LONG)
        assert self.stack.stats().pinned_slots == 0
        self.front.index.check()


@pytest.fixture
def opened() -> Iterator[OpenedStack]:
    opened = OpenedStack()
    yield opened
    opened.stack.close()


def test_guard_passes_a_lease_to_read_with_a_key_twice(opened: OpenedStack) -> None:
    a, b = keys_of("twice", 2)
    with opened.stack.reserve([a, b, a]) as lease:
        assert list(lease.keys) == [a, b]
    with opened.stack.fetch_local([a, b, a]) as lease:
        assert list(lease.keys) == [a, b, a]
        assert lease.slots[0] == lease.slots[2]
    assert opened.stack.flush(LONG)
    assert opened.stack.stats().pinned_slots == 0


def test_guard_ends_a_lease_to_fill_with_a_key_twice(opened: OpenedStack) -> None:
    inner = opened.front.reserve

    def reserve(keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        lease = inner(keys, parent)
        slots = [*lease.slots, *lease.slots]
        return Lease(
            keys, slots, range(len(slots)), opened.front.slab.view,
            lambda _, failed: lease.end(failed),
        )  # fmt: skip

    opened.front.reserve = reserve  # type: ignore[method-assign]
    [key] = keys_of("filled twice", 1)
    assert len(opened.stack.reserve([key, key])) == 0
    assert opened.front.contains([key]) == [False]
    assert opened.stack.stats().pinned_slots == 0


@pytest.mark.parametrize("slots", [[0, 0, 0], [0, 1, 2]], ids=["two keys", "two slots"])
def test_guard_ends_a_lease_to_read_without_one_slot_per_key(
    opened: OpenedStack, slots: list[int]
) -> None:
    a, b = keys_of("one slot", 2)
    with opened.stack.reserve([a, b]):
        pass
    assert opened.stack.flush(LONG)
    inner = opened.front.pin
    changed = wrong_lease(altered(slots=slots))(inner)
    opened.front.pin = changed  # type: ignore[method-assign]
    assert len(opened.stack.fetch_local([a, b, a])) == 0


def wrong_lease(change: Callable[[Lease], Any]) -> Callable[[Callable[..., Lease]], Any]:
    """Return a decorator of a method that changes the lease it returns."""
    return lambda method: lambda *arguments: change(method(*arguments))


def altered(**attributes: Any) -> Callable[[Lease], Lease]:
    def change(lease: Lease) -> Lease:
        for name, value in attributes.items():
            setattr(lease, name, value)
        return lease

    return change


def other_keys(lease: Lease) -> Lease:
    lease.positions = [at + 1 for at in range(len(lease.keys))]
    return lease


def same_slots(lease: Lease) -> Lease:
    lease.slots = [0] * len(lease.keys)
    return lease


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*EXCEPTION_NAMES, *WRONG_RESULTS])
def test_front_tier_method_that_fails_costs_only_its_result(
    opened: OpenedStack, method: str, name: str
) -> None:
    def wrong(*arguments: Any) -> Any:
        if name in WRONG_RESULTS:
            return WRONG_RESULTS[name](len(arguments[0]) if arguments else 1)
        error = EXCEPTIONS[name]()
        raise error

    opened.use()
    setattr(opened.front, method, wrong)
    opened.use()
    opened.stack.close() if method == "close" else None
    delattr(opened.front, method)
    if method != "close":
        opened.check_works()


@pytest.mark.parametrize("method", LENDING_METHODS)
@pytest.mark.parametrize("change", [other_keys, same_slots, altered(slots=Unusable())])
def test_lease_with_wrong_keys_or_slots_is_not_lent(
    opened: OpenedStack, method: str, change: Callable[[Lease], Lease]
) -> None:
    original = getattr(opened.front, method)
    setattr(opened.front, method, wrong_lease(change)(original))
    lease = getattr(opened.stack.front, method)(keys_of("a", 3))
    assert len(lease) == 0 or change is same_slots
    lease.end()
    delattr(opened.front, method)


@pytest.mark.parametrize("change", [other_keys, altered(slots=Unusable())])
def test_lease_of_branches_with_wrong_keys_or_slots_is_not_lent(
    opened: OpenedStack, change: Callable[[Lease], Lease]
) -> None:
    chain, sides = keys_of("a", 3), keys_of("side", 1)
    original = opened.front.reserve_branches
    opened.front.reserve_branches = wrong_lease(change)(original)  # type: ignore[method-assign]
    assert len(opened.stack.reserve_branches([(chain, None)], [(sides, chain[0])])) == 0
    delattr(opened.front, "reserve_branches")
    opened.check_works()


def test_count_of_a_prefix_above_the_chain_is_limited(opened: OpenedStack) -> None:
    opened.front.count_prefix = lambda *_: 1 << 60  # type: ignore[method-assign]
    request = GroupedRequest(Needs("state"))
    put_branches(opened.stack, *request.branches(0, 3))
    opened.front.remove([request.key(0, 1)])
    found = opened.stack.fetch_resume(request.groups, 0, 3 * BLOCK_TOKENS, BLOCK_TOKENS)
    assert (found.tokens, len(found.lease)) == (0, 0)  # the chain cannot be pinned
    found.lease.end()


def test_lease_with_an_end_that_raises_ends(
    opened: OpenedStack, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise SystemExit

    def with_failing_end(lease: Lease) -> Lease:
        return Lease(lease.keys, lease.slots, lease.positions, opened.front.slab.view, fails)

    opened.front.reserve = wrong_lease(with_failing_end)(opened.front.reserve)  # type: ignore[method-assign]
    lease = opened.stack.reserve(keys_of("a", 2))
    ended: list[Lease] = []
    lease.add_end_callback(lambda lease, _: ended.append(lease))
    lease.end()
    assert ended == [lease]
    assert "front tier ThirdPartyTier: end failed (SystemExit)" in caplog.text


def test_access_result_above_the_request_is_limited(opened: OpenedStack) -> None:
    opened.front.access = lambda *_: 1 << 60  # type: ignore[method-assign]
    match = opened.stack.match(keys_of("a", 3)).result(LONG)
    assert match.blocks == 3
    with opened.stack.fetch(match).result(LONG) as lease:
        assert len(lease) == 0


def test_front_tier_of_this_package_has_no_guard() -> None:
    front = DramTier(block_nbytes=PAGE, capacity=Size(PAGE))
    with Stack(front, profile="test") as stack:
        assert stack.front is front


@pytest.mark.parametrize("name", EXCEPTION_NAMES)
def test_recorder_that_raises_is_not_called_again(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = SimpleNamespace(times=0)

    class Broken(Recorder):
        def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
            calls.times += 1
            error = EXCEPTIONS[name]()
            raise error

        close = record  # type: ignore[assignment]

    front = DramTier(block_nbytes=PAGE, capacity=Size(4 * PAGE))
    stack = Stack(front, profile="test", recorder=Broken())
    for _ in range(3):
        assert stack.match(keys_of("a", 2)).result(LONG).blocks == 0
    stack.recorder.record(keys_of("a", 2), 5)
    assert calls.times == 1
    stack.close()
    assert "recorder Broken: failed" in caplog.text
