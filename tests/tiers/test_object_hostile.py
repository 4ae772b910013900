"""ObjectTier with a scripted store: the contract, deadlines, error answers and hostile answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("obstore")

from kvcache.testing import TierTests, keys_of
from kvcache.tiers.object import ObjectTier
from kvcache.tiers.object.names import block_name
from kvcache.tiers.object.requests import BufferGate
from tests.support.checked_loads import CLEAN, NBYTES, blocks, loaded
from tests.support.scripted_object_store import (
    Exchange,
    Fault,
    ScriptedObjectStore,
    cut_off,
    dripping,
    hang_up,
    only,
    rejecting,
    silent,
)

ACCESS_KEY, SECRET_KEY = "an-access-key-0123", "correct-horse-battery-77"
KEYS = keys_of("hostile", 4)
TIMEOUT_S = 0.6
MAX_WAIT_S = 10.0  # many timeouts; a call without a deadline would take forever


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_SCRIPTED_ACCESS_KEY", ACCESS_KEY)
    monkeypatch.setenv("KV_SCRIPTED_SECRET_KEY", SECRET_KEY)


@pytest.fixture
def store() -> Iterator[ScriptedObjectStore]:
    with ScriptedObjectStore() as store:
        yield store


@pytest.fixture
def tier(store: ScriptedObjectStore) -> Iterator[ObjectTier]:
    """A tier that is open before the store has a fault."""
    with closing(ObjectTier(**store.options(timeout_s=30))) as tier:
        yield tier


def opened(store: ScriptedObjectStore, **options: Any) -> closing[ObjectTier]:
    return closing(ObjectTier(**store.options(**options)))


CALLS: dict[str, Callable[[ObjectTier, Sequence[bytes]], object]] = {
    "contains": lambda tier, keys: tier.contains(keys),
    "load": loaded,
    "store": lambda tier, keys: tier.store(keys, blocks(keys)),
    "remove": lambda tier, keys: tier.remove(keys),
    "resolve": lambda tier, keys: tier.resolve(keys[0], "{}"),
    "forget": lambda tier, keys: tier.forget(keys[0]),
}


class TestObjectTierOnAScriptedStore(TierTests):
    @pytest.fixture
    def tier(self, store: ScriptedObjectStore) -> Iterator[ObjectTier]:
        with opened(store, timeout_s=30) as tier:
            yield tier


@pytest.mark.parametrize("fault", [silent, dripping])
@pytest.mark.parametrize("call", CALLS)
def test_call_to_endless_store_ends_with_a_failure(
    store: ScriptedObjectStore, call: str, fault: Fault
) -> None:
    if fault is dripping and call not in ("load", "resolve"):
        pytest.skip("the call reads no body")
    with opened(store, timeout_s=TIMEOUT_S) as tier:
        store.fault = fault
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no answer in time|was reset|error decoding"):
            CALLS[call](tier, KEYS)
        assert time.monotonic() - begun < MAX_WAIT_S


def test_hung_store_gets_no_request_in_the_second_half_of_a_call(
    store: ScriptedObjectStore,
) -> None:
    keys = keys_of("many", 50)
    with opened(store, timeout_s=TIMEOUT_S, connections=3) as tier:
        store.fault, begun = silent, len(store.requests)
        for call in ("contains", "load", "store"):
            with pytest.raises(ConnectionError):
                CALLS[call](tier, keys)
        assert len(store.requests) - begun == 3 * 3


def test_late_answer_writes_nothing_into_the_buffers(store: ScriptedObjectStore) -> None:
    answer, answered = threading.Event(), threading.Semaphore(0)

    def late(exchange: Exchange) -> bool:
        answer.wait()
        try:
            exchange.answer(200, bytes(NBYTES))
        finally:
            answered.release()
        return True

    with opened(store, timeout_s=TIMEOUT_S) as tier:
        store.fault = late
        into = [bytearray(CLEAN) for _ in KEYS]
        try:
            with pytest.raises(ConnectionError):
                tier.load(KEYS, [memoryview(buffer) for buffer in into])
        finally:
            answer.set()
        for _ in KEYS:
            assert answered.acquire(timeout=MAX_WAIT_S)
        store.fault = None
        assert tier.contains(KEYS) == [False] * 4
        assert into == [CLEAN] * 4


def test_requests_that_hang_cost_their_own_blocks(store: ScriptedObjectStore) -> None:
    names = [block_name(key) for key in KEYS[2:]]
    with opened(store, timeout_s=TIMEOUT_S * 4) as tier:
        assert tier.store(KEYS, blocks(KEYS)) == [True] * 4
        store.fault = lambda exchange: exchange.name in names and silent(exchange)
        assert loaded(tier, KEYS) == [True, True, False, False]
        assert tier.contains(KEYS) == [True, True, False, False]


def test_gate_of_an_ended_call_writes_nothing() -> None:
    gate, buffer = BufferGate(), bytearray(4)
    assert gate.write(memoryview(buffer), memoryview(b"abc")) == 3
    gate.close()
    with pytest.raises(TimeoutError):
        gate.write(memoryview(buffer), memoryview(b"late"))
    assert buffer == b"abc\0"


def test_cut_off_object_is_a_miss_and_the_others_are_loaded(
    store: ScriptedObjectStore, tier: ObjectTier
) -> None:
    tier.store(KEYS, blocks(KEYS))
    store.fault = lambda exchange: exchange.name == block_name(KEYS[1]) and cut_off(exchange)
    assert loaded(tier, KEYS) == [True, False, True, True]
    store.fault = None
    assert loaded(tier, KEYS) == [True] * 4


def test_body_of_a_too_large_object_is_not_read(
    store: ScriptedObjectStore, tier: ObjectTier
) -> None:
    tier.store(KEYS, blocks(KEYS))
    ended = threading.Event()

    def enormous(exchange: Exchange) -> bool:
        if exchange.name != block_name(KEYS[0]) or exchange.command != "GET":
            return False
        exchange.answer(200, nbytes=1 << 50)
        try:
            while not exchange.store.closing.is_set():
                exchange.wfile.write(bytes(1 << 20))
        except OSError:
            ended.set()  # the tier has closed the connection
        exchange.close_connection = True
        return True

    store.fault = enormous
    assert loaded(tier, KEYS) == [False, True, True, True]
    assert ended.wait(MAX_WAIT_S)
    assert ("DELETE", block_name(KEYS[0])) in store.requests
    assert tier.contains(KEYS) == [False, True, True, True]


@pytest.mark.parametrize("fault", [rejecting(503, "SlowDown"), silent])
def test_failed_removal_of_a_too_large_object_costs_no_other_block(
    store: ScriptedObjectStore, fault: Fault
) -> None:
    with opened(store, timeout_s=TIMEOUT_S * 4) as tier:
        tier.store(KEYS, blocks(KEYS))
        store.objects[block_name(KEYS[0])] = bytes(NBYTES + 1)
        store.fault = only("DELETE", fault)
        assert loaded(tier, KEYS) == [False, True, True, True]


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503])
def test_error_answers_to_reads_fail_the_call(
    store: ScriptedObjectStore, tier: ObjectTier, status: int
) -> None:
    tier.store(KEYS, blocks(KEYS))
    store.fault = rejecting(status)
    for call in ("contains", "load", "resolve"):
        with pytest.raises(ConnectionError, match=str(status)):
            CALLS[call](tier, KEYS)
    store.fault = None
    assert loaded(tier, KEYS) == [True] * 4


@pytest.mark.parametrize("status", [400, 403, 404, 500, 501, 507])
def test_error_answers_to_writes_are_declines_and_logged_once(
    store: ScriptedObjectStore, tier: ObjectTier, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    tier.store(KEYS[:2], blocks(KEYS[:2]))
    store.fault = only("PUT", rejecting(status, "QuotaExceeded", "no room"))
    for _ in range(3):
        assert tier.store(KEYS[2:], blocks(KEYS[2:])) == [False] * 2
    assert loaded(tier, KEYS) == [True, True, False, False]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"a PUT request failed ({status} QuotaExceeded no room)" in record.getMessage()
    assert list(tier.usage().declined_blocks.values()) == [6]
    with pytest.raises(ConnectionError, match="cannot write the reset: "):
        tier.forget(KEYS[0])


@pytest.mark.parametrize(
    ("status", "code", "held"),
    [
        (412, "PreconditionFailed", True),
        (409, "BlobAlreadyExists", True),
        (409, "ConditionalRequestConflict", False),
    ],
)
def test_object_that_exists_is_held_and_one_that_is_being_written_is_declined(
    store: ScriptedObjectStore, tier: ObjectTier, caplog: pytest.LogCaptureFixture,
    status: int, code: str, held: bool,
) -> None:  # fmt: skip
    store.fault = only("PUT", rejecting(status, code))
    assert tier.store(KEYS, blocks(KEYS)) == [held] * 4
    assert not caplog.records


@pytest.mark.parametrize("code", ["ContainerBeingDeleted", "InvalidBucketState", ""])
def test_conflict_that_is_no_existing_object_is_declined_and_logged(
    store: ScriptedObjectStore, tier: ObjectTier, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    store.fault = only("PUT", rejecting(409, code))
    assert tier.store(KEYS, blocks(KEYS)) == [False] * 4
    [record] = caplog.records
    assert f"a PUT request failed (409 {code or 'Code409'}" in record.getMessage()


@pytest.mark.parametrize("status", [429, 503])
def test_store_that_asks_for_fewer_writes_fails_the_call(
    store: ScriptedObjectStore, tier: ObjectTier, status: int
) -> None:
    store.fault = only("PUT", rejecting(status, "SlowDown"))
    with pytest.raises(ConnectionError, match="SlowDown"):
        tier.store(KEYS, blocks(KEYS))


def test_one_failed_request_is_a_miss_of_its_block(
    store: ScriptedObjectStore, tier: ObjectTier
) -> None:
    tier.store(KEYS, blocks(KEYS))
    fail = rejecting(500)
    store.fault = lambda exchange: exchange.name == block_name(KEYS[2]) and fail(exchange)
    assert tier.contains(KEYS) == [True, True, False, True]
    assert loaded(tier, KEYS) == [True, True, False, True]
    tier.remove(KEYS)
    store.fault = None
    assert tier.contains(KEYS) == [False, False, True, False]


def test_unreachable_store_is_logged_once_and_again_when_it_answers(
    store: ScriptedObjectStore, tier: ObjectTier, caplog: pytest.LogCaptureFixture
) -> None:
    store.fault = hang_up
    for _ in range(3):
        with pytest.raises(
            ConnectionError, match=r"object store at s3://bucket \(127.0.0.1:\d+\): "
        ):
            tier.contains(KEYS)
    store.fault = None
    for _ in range(2):
        assert tier.contains(KEYS) == [False] * 4
    down, up = [record.getMessage() for record in caplog.records]
    assert "object store at s3://bucket (127.0.0.1:" in down
    assert "): unreachable (" in down
    assert "): reachable again" in up


def test_store_that_is_down_at_start_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedObjectStore() as store:
        options = store.options(timeout_s=5)
    with closing(ObjectTier(**options)) as tier:
        [record] = caplog.records
        assert "unreachable (" in record.getMessage()
        assert "refused" in record.getMessage()
        with pytest.raises(ConnectionError):
            tier.contains(KEYS)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (rejecting(403, "InvalidAccessKeyId", "no such key"), "403 InvalidAccessKeyId no such key"),
        (rejecting(403, "AccessDenied"), "403 AccessDenied; the credentials need the right"),
        (rejecting(401, "Unauthorized"), "401 Unauthorized"),
        (rejecting(404, "NoSuchBucket", "it is not"), "404 NoSuchBucket it is not"),
        (rejecting(301, "PermanentRedirect"), "301 Received redirect without LOCATION"),
        (rejecting(400, "AuthorizationHeaderMalformed"), "region must be that of the bucket"),
    ],
)
def test_store_that_rejects_the_tier_stops_the_start(
    store: ScriptedObjectStore, fault: Fault, text: str
) -> None:
    store.fault = fault
    with pytest.raises(ValueError, match=r"^url is 's3://bucket', but the object store rej") as got:
        ObjectTier(**store.options())
    assert text in str(got.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_store_in_trouble_does_not_stop_the_start(store: ScriptedObjectStore, status: int) -> None:
    store.fault = rejecting(status)
    with opened(store) as tier:
        store.fault = None
        assert tier.store(KEYS, blocks(KEYS)) == [True] * 4


@pytest.mark.parametrize("filler", ["", "x" * 5000])
def test_text_of_the_store_is_one_printable_line_without_secrets(
    store: ScriptedObjectStore, tier: ObjectTier, caplog: pytest.LogCaptureFixture, filler: str
) -> None:
    text = f"\x1b[31m {SECRET_KEY} token=abcdefgh\r\nkvcache: forged\x00 {filler}"
    store.fault = rejecting(500, "Code", text)
    with pytest.raises(ConnectionError, match="500 Code") as raised:
        loaded(tier, KEYS)
    assert tier.store(KEYS, blocks(KEYS)) == [False] * 4
    with pytest.raises(ConnectionError, match="500 Code") as also_raised:
        tier.forget(KEYS[0])
    logged = [record.getMessage() for record in caplog.records]
    assert logged
    for shown in (*logged, str(raised.value), str(also_raised.value)):
        assert shown.isprintable()
        assert "forged" in shown
        assert SECRET_KEY not in shown
        assert "abcdefgh" not in shown
        assert len(shown) < 1000


def test_codes_of_a_hostile_store_are_logged_at_most_16_times(
    store: ScriptedObjectStore, tier: ObjectTier, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(40):
        store.fault = rejecting(500, f"Code{number}")
        assert tier.store(KEYS[:1], blocks(KEYS[:1])) == [False]
    assert len(caplog.records) == 16
