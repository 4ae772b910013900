"""Whatever a policy raises or returns costs no slot and no block: LRU takes over."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvcache.eviction import Lru, Take, policy_option
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import replace_policy_method
from tests.support.wrong_results import EXCEPTIONS, PanicException, Unusable

SLOTS = 24
VERBS = ("access", "admit", "add", "remove", "evict")
EXCEPTION_NAMES = sorted(EXCEPTIONS.keys() - {"KeyboardInterrupt"})  # a Ctrl-C is the application's


@pytest.fixture
def tier() -> Iterator[DramTier]:
    tier = DramTier(block_nbytes=PAGE, capacity=Size(SLOTS * PAGE))
    tier.slab.wait_populated()
    yield tier
    tier.close()


def serve(tier: DramTier, keys: list[bytes]) -> int:
    """Serve a request for ``keys``; give how many were held."""
    held = tier.access(keys)
    with tier.pin(keys) as lease:
        assert list(lease.keys) == keys[: len(lease)]
        assert [bytes(v) for v in lease.views] == [block_of(k, PAGE) for k in lease.keys]
    with tier.reserve(keys[held:], keys[held - 1] if held else None) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, PAGE)
    return held


def traffic(tier: DramTier, requests: int = 60) -> None:
    """Traffic that uses every method of a policy; whatever went wrong before, all of it works."""
    choose = random.Random(7)
    for _ in range(requests):
        serve(tier, keys_of(f"chat {choose.randrange(9)}", choose.randrange(1, 9)))
        if choose.random() < 0.1:
            tier.remove(keys_of(f"chat {choose.randrange(9)}", 2))
        tier.index.check()
    last = keys_of("last", SLOTS)  # every slot can be had
    serve(tier, last)
    assert tier.access(last) == SLOTS
    stats = tier.stats()
    assert stats.pinned_slots == 0
    assert stats.used_blocks == stats.stored_blocks - stats.evicted_blocks - stats.dropped_blocks


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", EXCEPTION_NAMES)
def test_a_policy_that_raises_is_replaced_and_no_block_is_lost(
    tier: DramTier, verb: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*_: object) -> None:
        error = EXCEPTIONS[name]()
        raise error

    traffic(tier)
    before = tier.index.ready()
    replace_policy_method(tier, verb, wrong)
    held = keys_of("last", 3)
    if verb == "remove":
        tier.remove(held[2:])
    else:
        serve(tier, keys_of("new", 4))
    assert len(before.keys() - tier.index.ready().keys()) <= 4
    assert type(tier.index.policy) is Lru
    traffic(tier)
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "eviction policy FaultyPolicy: failed" in record.message


@pytest.mark.parametrize(
    ("answer", "replaced"),
    [
        (None, True), ("3", True), (2.5, True), (float("nan"), True), ([], True),
        (Unusable(), True), (-1, False), (1 << 80, False), (True, False), (0, False),
    ],
)  # fmt: skip
def test_an_admit_of_any_value_costs_no_slot(
    tier: DramTier, answer: object, replaced: bool
) -> None:
    traffic(tier)
    replace_policy_method(tier, "admit", lambda *_: answer)
    serve(tier, keys_of("new", 4))
    tier.index.check()
    assert (type(tier.index.policy) is Lru) == replaced
    replace_policy_method(tier, "", print)
    traffic(tier)


@pytest.mark.parametrize(
    "offered",
    [None, 3, [], [None], [b"never held"], "text", b"bytes", Unusable(), [Unusable()]],
    ids=lambda offered: type(offered).__name__,
)
@pytest.mark.parametrize("raises", [False, True])
def test_an_offer_of_any_value_costs_no_slot(tier: DramTier, offered: Any, raises: bool) -> None:
    def evict(count: int, take: Take) -> None:
        take([next(key for key in tier.index.ready())] * 2)
        take(offered)
        if raises:
            raise PanicException

    traffic(tier)
    replace_policy_method(tier, "evict", evict)
    serve(tier, keys_of("new", 4))
    tier.index.check()
    replace_policy_method(tier, "", print)
    traffic(tier)


def test_a_policy_that_evicts_later_than_it_is_asked_to_takes_nothing(tier: DramTier) -> None:
    kept: list[Take] = []
    traffic(tier)
    replace_policy_method(tier, "evict", lambda _, take: kept.append(take))
    serve(tier, keys_of("new", 4))
    held = tier.index.ready()
    assert kept[0](list(held)[-1:]) == 0
    assert tier.index.ready() == held
    tier.index.check()


def test_a_policy_that_raises_halfway_through_an_eviction_ends_with_it(tier: DramTier) -> None:
    def evict(count: int, take: Take) -> None:
        assert take([keys_of("last", SLOTS)[-1]]) == 1
        raise PanicException

    traffic(tier)
    replace_policy_method(tier, "evict", evict)
    assert serve(tier, keys_of("new", 4)) == 0
    assert tier.access(keys_of("new", 4)) == 4
    assert tier.access(keys_of("last", SLOTS)) == SLOTS - 4
    traffic(tier)


@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_that_interrupts_a_policy_is_the_applications(tier: DramTier, verb: str) -> None:
    def ends(*_: object) -> None:
        raise SystemExit

    def serve_new(_: object) -> None:
        serve(tier, keys_of("new", 4))

    traffic(tier)
    replace_policy_method(tier, verb, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, ends)
    try:
        with pytest.raises(SystemExit):
            (tier.remove if verb == "remove" else serve_new)(keys_of("last", 1))
    finally:
        signal.signal(signal.SIGTERM, before)
    tier.index.check()
    assert tier.stats().pinned_slots == 0
    traffic(tier)


def test_a_keyboard_interrupt_in_another_thread_is_the_policys(tier: DramTier) -> None:
    def wrong(*_: object) -> None:
        raise KeyboardInterrupt

    replace_policy_method(tier, "add", wrong)
    thread = threading.Thread(target=serve, args=(tier, keys_of("new", 4)))
    thread.start()
    thread.join()
    assert tier.access(keys_of("new", 4)) == 4


class Unmade(Lru):
    """A policy that cannot be made."""

    def __init__(self, capacity: int) -> None:
        raise LookupError("no model file")


def test_a_policy_that_cannot_be_made_names_the_option() -> None:
    make = policy_option(f"{__name__}:Unmade")
    with pytest.raises(ValueError, match=r"eviction is '.*:Unmade': cannot make it \(LookupError"):
        make(8)
