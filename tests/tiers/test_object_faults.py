"""ObjectTier on a real S3 server that is killed, restarted, stopped, full, or denies access."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("obstore")

from kvcache.testing import keys_of, run_in_threads
from kvcache.tiers.object import ObjectTier
from tests.support import s3_server
from tests.support.checked_loads import CLEAN, blocks, loaded
from tests.support.s3_server import Server
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.set_login(monkeypatch)


@pytest.fixture
def tier(server: Server, request: pytest.FixtureRequest) -> Iterator[ObjectTier]:
    with closing(ObjectTier(**server.options(request.node.name, timeout_s=60))) as tier:
        yield tier


def answers(tier: ObjectTier, keys: Sequence[bytes]) -> bool:
    try:
        return all(tier.contains(keys))
    except ConnectionError:
        return False


def test_killed_server_fails_calls_and_is_used_again_after_a_restart(
    server: Server, tier: ObjectTier, caplog: pytest.LogCaptureFixture
) -> None:
    keys, new = keys_of("kill", 3), keys_of("kill, new", 3)
    assert tier.store(keys, blocks(keys)) == [True] * 3
    server.kill()
    for call in (tier.contains, lambda keys: loaded(tier, keys)):
        with pytest.raises(ConnectionError, match="object store at s3://kv-blocks"):
            call(keys)
    with pytest.raises(ConnectionError):
        tier.store(new, blocks(new))
    server.start()
    assert loaded(tier, keys + new) == [True] * 3 + [False] * 3
    assert tier.store(new, blocks(new)) == [True] * 3
    down, up = [record.getMessage() for record in caplog.records]
    assert "unreachable (" in down
    assert "reachable again" in up
    server.kill()
    server.start()  # between two calls: idle connections are closed
    eventually(lambda: answers(tier, keys), "it is asked again")
    assert loaded(tier, keys) == [True] * 3


def test_server_down_at_start_is_a_warning(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("late", 2)
    server.kill()
    try:
        with closing(ObjectTier(**server.options("late", timeout_s=60))) as tier:
            assert "unreachable (" in caplog.text
            with pytest.raises(ConnectionError):
                tier.contains(keys)
            server.start()
            assert tier.store(keys, blocks(keys)) == [True, True]
            assert "reachable again" in caplog.records[-1].getMessage()
    finally:
        server.kill()
        server.start()


def test_stopped_server_ends_the_calls_and_writes_nothing_afterwards(server: Server) -> None:
    keys = keys_of("hang", 3)
    with closing(ObjectTier(**server.options("hang", timeout_s=60))) as tier:
        assert tier.store(keys, blocks(keys)) == [True] * 3
    with closing(ObjectTier(**server.options("hang", timeout_s=1))) as tier:
        into = [bytearray(CLEAN) for _ in keys]
        with server.stopped():
            with pytest.raises(ConnectionError, match="no answer in time"):
                tier.load(keys, [memoryview(buffer) for buffer in into])
            with pytest.raises(ConnectionError, match="no answer in time"):
                tier.contains(keys)
            with pytest.raises(ConnectionError, match="no answer in time"):
                tier.store(keys, blocks(keys))
        eventually(lambda: answers(tier, keys), "it answers again")
        assert into == [CLEAN] * 3
        eventually(lambda: all(loaded(tier, keys)), "it serves again")
        assert into == [CLEAN] * 3


def test_full_server_declines_stores_and_serves_loads(
    server: Server, tier: ObjectTier, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = keys_of("old", 3), keys_of("new", 3)
    assert tier.store(old, blocks(old)) == [True] * 3
    server.kill()
    try:
        server.start(full=True)
        eventually(lambda: all(loaded(tier, old)), "it serves")
        caplog.clear()
        for _ in range(2):
            assert tier.store(new, blocks(new)) == [False] * 3
        assert loaded(tier, old + new) == [True] * 3 + [False] * 3
        [message] = [record.getMessage() for record in caplog.records]
        assert "a PUT request failed (500" in message
    finally:
        server.kill()
        server.start()
    eventually(lambda: answers(tier, old), "it answers")
    assert tier.store(new, blocks(new)) == [True] * 3


def test_user_without_the_right_to_write_reads_and_is_declined(
    server: Server, tier: ObjectTier, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    keys, new = keys_of("read", 3), keys_of("read, new", 2)
    assert tier.store(keys, blocks(keys)) == [True] * 3
    s3_server.set_login(monkeypatch, s3_server.READER)
    prefix = test_user_without_the_right_to_write_reads_and_is_declined.__name__
    with closing(ObjectTier(**server.options(prefix, timeout_s=60))) as reader:
        assert loaded(reader, keys + new) == [True] * 3 + [False] * 2
        for _ in range(2):
            assert reader.store(new, blocks(new)) == [False] * 2
        reader.remove(keys)
        assert reader.contains(keys) == [True] * 3
        with pytest.raises(ConnectionError, match="cannot write the reset: 403"):
            reader.forget(keys[0])
    put, delete = [record.getMessage() for record in caplog.records]
    assert "a PUT request failed (403 AccessDenied" in put
    assert "a DELETE request failed (403 AccessDenied" in delete


@pytest.mark.parametrize("wrong", ["key", "secret", "bucket"])
def test_wrong_credentials_or_bucket_stop_the_start(
    server: Server, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    options = server.options("wrong", timeout_s=60)
    if wrong == "key":
        s3_server.set_login(monkeypatch, s3_server.UNKNOWN)
    elif wrong == "secret":
        login = s3_server.ADMIN._replace(secret_key="another-secret-0123456789")
        s3_server.set_login(monkeypatch, login)
    else:
        options["url"] = "s3://no-such-bucket/wrong"
    with pytest.raises(ValueError, match="but the object store rejects the tier: ") as raised:
        ObjectTier(**options)
    expected = {
        "key": "403 InvalidAccessKeyId",
        "secret": "403 SignatureDoesNotMatch",
        "bucket": "404 NoSuchBucket",
    }
    assert expected[wrong] in str(raised.value)
    assert "secret-0123456789" not in str(raised.value)


def test_server_killed_under_load_never_returns_wrong_bytes(tmp_path: Path) -> None:
    """Four threads work through two kills: no wrong byte, no hang, and the tier recovers."""
    done = threading.Event()
    with (
        s3_server.server(tmp_path) as server,
        closing(ObjectTier(**server.options("load", timeout_s=10))) as tier,
    ):

        def work(thread: int) -> None:
            if thread == 4:
                for _ in range(2):
                    eventually(lambda: len(server.names("load")) > 8, "blocks arrive")
                    server.kill()
                    server.start()
                done.set()
                return
            turn = 0
            while not done.is_set():
                keys = keys_of(f"under load {turn % 10}", 4)
                turn += 1
                try:
                    tier.store(keys, blocks(keys))
                    loaded(tier, keys)
                    tier.remove(keys[:1])
                except ConnectionError:
                    continue

        run_in_threads(5, work)
        keys = keys_of("afterwards", 4)
        eventually(lambda: all(stored(tier, keys)), "it stores again")
        assert loaded(tier, keys) == [True] * 4


def stored(tier: ObjectTier, keys: Sequence[bytes]) -> list[bool]:
    try:
        return tier.store(keys, blocks(keys))
    except ConnectionError:
        return [False]
