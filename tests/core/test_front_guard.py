"""Whatever a front tier or a recorder of others raises or returns is a miss, or a decline."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache import Lease, Stack
from kvcache.lower.tier import LowerTier
from kvcache.replay.recorder import Recorder
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier
from tests.support.stack_under_test import LONG
from tests.support.wrong_results import EXCEPTIONS, WRONG_RESULTS, Unusable

EXCEPTION_NAMES = sorted(EXCEPTIONS.keys() - {"KeyboardInterrupt"})  # a Ctrl-C is the application's
LENDING = ("reserve", "pin", "pin_any")
VERBS = (*LENDING, "access", "contains", "stats", "clear", "mark_done", "protect", "close")


class Others(DramTier):
    """A front tier of another package."""


class Opened:
    """A stack over such a tier, with a tier below it."""

    def __init__(self) -> None:
        self.front = Others(block_nbytes=PAGE, capacity=Size(16 * PAGE))
        self.front.slab.wait_populated()
        self.tier = FaultyTier()
        self.lower = LowerTier(
            self.tier, name="l2", front=self.front, namespace=b"n" * 32, deadline_s=LONG
        )
        self.stack = Stack(self.front, [self.lower], profile="test")

    def use(self) -> None:
        """Call whatever an engine calls."""
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
            if coming := stack.prefetch(keys):
                coming.result(LONG)
            stack.hint(keys, done=True)
            stack.hint(keys, keep=1.0)
            assert stack.flush(LONG)
            stack.stats()
        stack.clear()

    def works(self) -> None:
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
def opened() -> Iterator[Opened]:
    opened = Opened()
    yield opened
    opened.stack.close()


def wrong_lease(change: Callable[[Lease], Any]) -> Callable[[Callable[..., Lease]], Any]:
    """What makes a wrong answer of a right method, whose lease is not leaked."""
    return lambda right: lambda *arguments: change(right(*arguments))


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


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [*EXCEPTION_NAMES, *WRONG_RESULTS])
def test_a_front_tier_that_goes_wrong_costs_its_own_answer(
    opened: Opened, verb: str, name: str
) -> None:
    def wrong(*arguments: Any) -> Any:
        if name in WRONG_RESULTS:
            return WRONG_RESULTS[name](len(arguments[0]) if arguments else 1)
        error = EXCEPTIONS[name]()
        raise error

    opened.use()
    setattr(opened.front, verb, wrong)
    opened.use()
    opened.stack.close() if verb == "close" else None
    delattr(opened.front, verb)
    if verb != "close":
        opened.works()


@pytest.mark.parametrize("verb", LENDING)
@pytest.mark.parametrize("change", [other_keys, same_slots, altered(slots=Unusable())])
def test_a_lease_of_anything_else_is_not_lent(
    opened: Opened, verb: str, change: Callable[[Lease], Lease]
) -> None:
    right = getattr(opened.front, verb)
    setattr(opened.front, verb, wrong_lease(change)(right))
    lease = getattr(opened.stack.front, verb)(keys_of("a", 3))
    assert len(lease) == 0 or change is same_slots
    lease.end()
    delattr(opened.front, verb)


def test_a_lease_whose_end_raises_ends(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> None:
        raise SystemExit

    opened.front._publish = fails  # type: ignore[assignment,method-assign]
    lease = opened.stack.reserve(keys_of("a", 2))
    ended: list[Lease] = []
    lease.add_end_callback(lambda lease, _: ended.append(lease))
    lease.end()
    assert ended == [lease]
    assert "front tier Others: end failed (SystemExit)" in caplog.text


def test_an_access_beyond_what_was_asked_for_is_cut(opened: Opened) -> None:
    opened.front.access = lambda *_: 1 << 60  # type: ignore[method-assign]
    match = opened.stack.match(keys_of("a", 3)).result(LONG)
    assert match.blocks == 3
    with opened.stack.fetch(match).result(LONG) as lease:
        assert len(lease) == 0


def test_a_front_tier_of_ours_is_called_directly() -> None:
    front = DramTier(block_nbytes=PAGE, capacity=Size(PAGE))
    with Stack(front, profile="test") as stack:
        assert stack.front is front


@pytest.mark.parametrize("name", EXCEPTION_NAMES)
def test_a_recorder_that_raises_is_told_nothing_more(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = SimpleNamespace(times=0)

    class Broken(Recorder):
        def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
            told.times += 1
            error = EXCEPTIONS[name]()
            raise error

        close = record  # type: ignore[assignment]

    front = DramTier(block_nbytes=PAGE, capacity=Size(4 * PAGE))
    stack = Stack(front, profile="test", recorder=Broken())
    for _ in range(3):
        assert stack.match(keys_of("a", 2)).result(LONG).blocks == 0
    stack.recorder.record(keys_of("a", 2), 5)
    assert told.times == 1
    stack.close()
    assert "recorder Broken: failed" in caplog.text
