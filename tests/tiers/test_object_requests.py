"""ObjectTier with a scripted store: which requests it sends, how many at once, and its threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.waiting import eventually

pytest.importorskip("obstore")

from kvcache.testing import keys_of, run_in_threads
from kvcache.tiers.object import ObjectTier
from tests.support.checked_loads import blocks, loaded
from tests.support.scripted_object_store import ScriptedObjectStore, rejecting, silent
from tests.tiers.test_object_hostile import (
    ACCESS_KEY,
    CALLS,
    KEYS,
    SECRET_KEY,
    opened,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedObjectStore]:
    monkeypatch.setenv("KV_SCRIPTED_ACCESS_KEY", ACCESS_KEY)
    monkeypatch.setenv("KV_SCRIPTED_SECRET_KEY", SECRET_KEY)
    with ScriptedObjectStore() as store:
        yield store


@pytest.fixture
def tier(store: ScriptedObjectStore) -> Iterator[ObjectTier]:
    with opened(store, timeout_s=30) as tier:
        yield tier


def test_failed_requests_are_not_repeated(store: ScriptedObjectStore, tier: ObjectTier) -> None:
    store.fault, begun = rejecting(500), len(store.requests)
    with pytest.raises(ConnectionError):
        tier.contains(KEYS)
    with pytest.raises(ConnectionError):
        loaded(tier, KEYS)
    assert tier.store(KEYS, blocks(KEYS)) == [False] * 4
    assert len(store.requests) - begun == 3 * len(KEYS)


def test_requests_are_signed_and_never_contain_the_secret(
    store: ScriptedObjectStore, tier: ObjectTier
) -> None:
    tier.store(KEYS, blocks(KEYS))
    for headers in store.headers:
        assert f"Credential={ACCESS_KEY}/" in headers["authorization"]
        assert SECRET_KEY not in str(headers)


def test_key_twice_in_a_batch_is_one_request_to_write(
    store: ScriptedObjectStore, tier: ObjectTier
) -> None:
    twice = [KEYS[0], KEYS[1], KEYS[0]]
    begun = len(store.requests)
    assert tier.store(twice, blocks(twice)) == [True] * 3
    assert [method for method, _ in store.requests[begun:]] == ["PUT"] * 2
    tier.remove(twice)
    assert [method for method, _ in store.requests[begun + 2 :]] == ["DELETE"] * 2


@pytest.mark.parametrize(("mode", "condition"), [("create", "*"), ("overwrite", None)])
def test_mode_decides_whether_writes_are_conditional(
    store: ScriptedObjectStore, mode: str, condition: str | None
) -> None:
    with opened(store, mode=mode) as tier:
        for value in (b"first value", b"other value"):
            assert tier.store(KEYS[:1], [memoryview(value)]) == [True]
        buffer = bytearray(11)
        assert tier.load(KEYS[:1], [memoryview(buffer)]) == [11]
    assert bytes(buffer) == (b"first value" if mode == "create" else b"other value")
    puts = [
        headers.get("if-none-match")
        for (method, _), headers in zip(store.requests, store.headers, strict=True)
        if method == "PUT"
    ]
    assert puts == [condition] * 2


def test_requests_at_once_are_bounded(store: ScriptedObjectStore) -> None:
    with opened(store, connections=3, timeout_s=60) as tier:
        store.fault = lambda _: store.closing.wait(0.01)  # False: requests only overlap more
        run_in_threads(4, lambda thread: _store_and_load(tier, keys_of(f"of {thread}", 20)))
    assert 1 < store.most_at_once <= 3


def _store_and_load(tier: ObjectTier, keys: Sequence[bytes]) -> None:
    assert tier.store(keys, blocks(keys)) == [True] * len(keys)
    assert loaded(tier, keys) == [True] * len(keys)


def threads_of_tiers() -> int:
    return sum("kvcache-object" in thread.name for thread in threading.enumerate())


def test_close_ends_the_threads_and_fails_later_calls(store: ScriptedObjectStore) -> None:
    before = threads_of_tiers()
    with opened(store, connections=7) as tier:
        assert threads_of_tiers() == before + 7
    eventually(lambda: threads_of_tiers() <= before, "the threads have ended")
    for call in ("contains", "load", "store"):
        with pytest.raises(ConnectionError, match="the tier is closed"):
            CALLS[call](tier, KEYS)


EXIT = """
import os, threading
from kvcache.tiers.object import ObjectTier
from tests.tiers.test_object_hostile import CALLS, KEYS

tier = ObjectTier(url="s3://bucket", endpoint=os.environ["ENDPOINT"], timeout_s=600)
for call in ("load", "store"):
    threading.Thread(target=CALLS[call], args=(tier, KEYS), daemon=True).start()
input()
"""


def test_process_ends_while_requests_hang(
    store: ScriptedObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDPOINT", store.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    store.fault = lambda exchange: not exchange.name.endswith("start") and silent(exchange)
    command = [sys.executable, "-c", EXIT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as child:
        eventually(lambda: len(store.requests) == 1 + 2 * len(KEYS), "all requests hang")
        child.communicate(b"end\n", timeout=60)
    assert child.returncode == 0
