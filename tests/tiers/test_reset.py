"""A reset outlasts its process: what was stored before it is found by no stack opened later."""

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
SPACE = keys_of("namespace", 1)[0]
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


@pytest.fixture(params=["l1-disk", "l1-redis"])
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
        else:
            server = running.enter_context(redis_servers.server(tmp_path / "redis"))
            monkeypatch.setenv("KVCACHE__REDIS__URL", server.url)
            monkeypatch.setenv("KVCACHE__REDIS__TIMEOUT_S", "30")
        yield name


@pytest.fixture
def opened(profile: str) -> Iterator[Opened]:
    """Opens a stack, as the next engine on the same tier; the one before it is closed."""
    last: list[Stack] = []

    def opened(namespace: bytes = SPACE) -> Stack:
        if last:
            last.pop().close()
        last.append(open_stack(profile, block_nbytes=NBYTES, namespace=namespace))
        last[0].front.slab.wait_populated()
        return last[0]

    yield opened
    for stack in last:
        stack.close()


def test_clear_next_stack_finds_nothing_of_before(opened: Opened) -> None:
    stack = opened()
    put(stack)
    assert stack.clear()
    assert found(stack) == 0
    assert found(opened()) == 0


def test_clear_next_stack_finds_what_was_stored_after_it_was_opened(opened: Opened) -> None:
    stack = opened()
    put(stack)
    stack.clear()
    put(stack)  # under a namespace of its own: the weights may be others
    stack = opened()
    assert found(stack) == 0
    put(stack)
    assert found(opened()) == len(KEYS)


def test_clear_twice_in_two_lives_forgets_both(opened: Opened) -> None:
    for _ in range(2):
        stack = opened()
        assert found(stack) == 0
        put(stack)
        stack.clear()
    assert found(opened()) == 0


def test_clear_leaves_other_namespaces(opened: Opened) -> None:
    other = keys_of("another", 1)[0]
    put(opened(other))
    put(stack := opened())
    stack.clear()
    assert found(opened(other)) == len(KEYS)


def test_clear_without_a_namespace_is_durable_too(opened: Opened) -> None:
    stack = opened(b"")
    put(stack)
    assert found(opened(b"")) == len(KEYS)
    opened(b"").clear()
    assert found(opened(b"")) == 0


def test_clear_before_anything_was_asked_is_durable(opened: Opened) -> None:
    put(opened())
    assert opened().clear()
    assert found(opened()) == 0


KILLED = f"""
import os, signal
from kvcache.profiles import open_stack
from tests.tiers.test_reset import KEYS, SPACE, put
stack = open_stack(os.environ["PROFILE"], block_nbytes={NBYTES}, namespace=SPACE)
stack.front.slab.wait_populated()
put(stack)
assert stack.clear()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clear_process_killed_right_after_next_stack_finds_nothing(
    profile: str, opened: Opened
) -> None:
    environment = os.environ | {"PROFILE": profile, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert found(opened()) == 0


def test_clear_shared_server_engine_that_runs_keeps_its_own(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is opened again, as docs/vllm.md has it."""
    if profile != "l1-redis":
        pytest.skip("a directory has one engine")
    with ExitStack() as running:
        first, second = (
            running.enter_context(open_stack(profile, block_nbytes=NBYTES, namespace=SPACE))
            for _ in range(2)
        )
        for stack in (first, second):
            stack.front.slab.wait_populated()
        put(second)
        first.clear()
        assert found(second) == len(KEYS)
        with open_stack(profile, block_nbytes=NBYTES, namespace=SPACE) as third:
            assert found(third) == 0


def test_store_namespace_that_was_reset_reads_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a minute: else a server that is full may evict it before the blocks of before."""
    keys = keys_of("block", 4)
    with redis_servers.server(tmp_path / "redis") as server:

        def reads() -> int:
            stats: dict[str, dict[str, int]] = server.client().info("commandstats")
            return int(stats.get("cmdstat_get", {"calls": 0})["calls"])

        tier = RedisTier(url=server.url, timeout_s=30)
        with closing(tier):
            assert tier.store(keys[:1], [memoryview(b"block")]) == [True]
            assert reads() == 0
            tier.forget(SPACE)
            for key in keys[1:3]:
                assert tier.store([key], [memoryview(b"block")]) == [True]
            assert reads() == 1
            tier.reset_read_interval_s = 0.0
            assert tier.store(keys[3:], [memoryview(b"block")]) == [True]
            assert reads() == 2


def test_open_stack_identity_is_shown_by_inspect(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model": "chat", "weights": "digest 1234", "config": "x" * 1000}
    with open_stack(profile, block_nbytes=NBYTES, namespace=SPACE, identity=fields) as stack:
        stack.front.slab.wait_populated()
        put(stack)
    assert cli.main(["inspect", "--profile", profile, "--json"]) == 0
    [tier] = json.loads(capsys.readouterr().out)["tiers"]
    shown = tier["namespaces"][SPACE.hex()]["identity"]
    assert shown["config"].startswith("digest ")
    assert shown | {"config": ""} == fields | {"config": ""}
