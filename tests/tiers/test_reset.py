"""Resets survive the process: a stack opened later finds no block from before a reset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("redis")
pytest.importorskip("xxhash")

from kvcache import cli
from kvcache.profiles import open_stack
from kvcache.stack import Stack
from kvcache.testing import block_of, keys_of
from kvcache.tiers.redis import RedisTier
from tests.support import redis_servers

NBYTES = 32 << 10
KEYS = keys_of("chain", 12)
NAMESPACE = keys_of("namespace", 1)[0]
ROOT = Path(__file__).resolve().parents[2]

Opened = Callable[..., Stack]


def put(stack: Stack, keys: Sequence[bytes] = KEYS) -> None:
    with stack.reserve(keys) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, NBYTES)
    assert stack.flush(60)


def found(stack: Stack, keys: Sequence[bytes] = KEYS) -> int:
    with stack.fetch(stack.match(keys).result()).result() as lease:
        return len(lease)


@pytest.fixture(params=["l1-disk", "l1-redis", "l1-object"])
def profile(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    name: str = request.param
    tier = name.removeprefix("l1-").upper()
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "4MiB")
    monkeypatch.setenv(f"KVCACHE__{tier}__DEADLINE_S", "30")
    with ExitStack() as running:
        if tier == "DISK":
            monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "disk"))
            monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "4MiB")
        elif tier == "OBJECT":
            monkeypatch.setenv("KVCACHE__OBJECT__URL", str(tmp_path / "objects"))
        else:
            server = running.enter_context(redis_servers.server(tmp_path / "redis"))
            monkeypatch.setenv("KVCACHE__REDIS__URL", server.url)
            monkeypatch.setenv("KVCACHE__REDIS__TIMEOUT_S", "30")
        yield name


@pytest.fixture
def opened(profile: str) -> Iterator[Opened]:
    """Closes the previous stack and opens the next one on the same tier."""
    last: list[Stack] = []

    def opened(namespace: bytes = NAMESPACE) -> Stack:
        if last:
            last.pop().close()
        last.append(open_stack(profile, block_nbytes=NBYTES, namespace=namespace))
        last[0].front.slab.wait_populated()
        return last[0]

    yield opened
    for stack in last:
        stack.close()


def test_clear_hides_blocks_from_the_next_stack(opened: Opened) -> None:
    stack = opened()
    put(stack)
    assert stack.clear()
    assert found(stack) == 0
    assert found(opened()) == 0


def test_blocks_stored_after_clear_are_found_only_after_reopening(opened: Opened) -> None:
    stack = opened()
    put(stack)
    stack.clear()
    put(stack)  # under a separate namespace: the weights may differ
    stack = opened()
    assert found(stack) == 0
    put(stack)
    assert found(opened()) == len(KEYS)


def test_clear_in_two_processes_hides_blocks_of_both(opened: Opened) -> None:
    for _ in range(2):
        stack = opened()
        assert found(stack) == 0
        put(stack)
        stack.clear()
    assert found(opened()) == 0


def test_clear_keeps_other_namespaces(opened: Opened) -> None:
    other = keys_of("another", 1)[0]
    put(opened(other))
    put(stack := opened())
    stack.clear()
    assert found(opened(other)) == len(KEYS)


def test_clear_without_a_namespace_is_durable(opened: Opened) -> None:
    stack = opened(b"")
    put(stack)
    assert found(opened(b"")) == len(KEYS)
    opened(b"").clear()
    assert found(opened(b"")) == 0


def test_clear_before_any_call_is_durable(opened: Opened) -> None:
    put(opened())
    assert opened().clear()
    assert found(opened()) == 0


KILLED = f"""
import os, signal
from kvcache.profiles import open_stack
from tests.tiers.test_reset import KEYS, NAMESPACE, put
stack = open_stack(os.environ["PROFILE"], block_nbytes={NBYTES}, namespace=NAMESPACE)
stack.front.slab.wait_populated()
put(stack)
assert stack.clear()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clear_before_a_kill_is_durable(profile: str, opened: Opened) -> None:
    environment = os.environ | {"PROFILE": profile, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert found(opened()) == 0


def test_clear_on_shared_server_keeps_blocks_of_running_stacks(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lose them when they are opened again (docs/vllm.md)."""
    if profile != "l1-redis":
        pytest.skip("a directory has one engine")
    with ExitStack() as running:
        first, second = (
            running.enter_context(open_stack(profile, block_nbytes=NBYTES, namespace=NAMESPACE))
            for _ in range(2)
        )
        for stack in (first, second):
            stack.front.slab.wait_populated()
        put(second)
        first.clear()
        assert found(second) == len(KEYS)
        with open_stack(profile, block_nbytes=NBYTES, namespace=NAMESPACE) as third:
            assert found(third) == 0


def test_store_after_reset_reads_the_reset_key_once_per_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full server could otherwise evict the key before the old blocks."""
    keys = keys_of("block", 4)
    with redis_servers.server(tmp_path / "redis") as server:

        def reads() -> int:
            stats: dict[str, dict[str, int]] = server.client().info("commandstats")
            return int(stats.get("cmdstat_get", {"calls": 0})["calls"])

        tier = RedisTier(url=server.url, timeout_s=30)
        with closing(tier):
            assert tier.store(keys[:1], [memoryview(b"block")]) == [True]
            assert reads() == 0
            tier.forget(NAMESPACE)
            for key in keys[1:3]:
                assert tier.store([key], [memoryview(b"block")]) == [True]
            assert reads() == 1
            tier.reset_read_interval_s = 0.0
            assert tier.store(keys[3:], [memoryview(b"block")]) == [True]
            assert reads() == 2


def test_identity_of_open_stack_is_shown_by_inspect(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model": "chat", "weights": "digest 1234", "config": "x" * 1000}
    with open_stack(profile, block_nbytes=NBYTES, namespace=NAMESPACE, identity=fields) as stack:
        stack.front.slab.wait_populated()
        put(stack)
    assert cli.main(["inspect", "--profile", profile, "--json"]) == 0
    [tier] = json.loads(capsys.readouterr().out)["tiers"]
    shown = tier["namespaces"][NAMESPACE.hex()]["identity"]
    assert shown["config"].startswith("digest ")
    assert shown | {"config": ""} == fields | {"config": ""}
