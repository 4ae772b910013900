"""Several engines store the same blocks on one Redis server at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("redis")

from kvcache import Stack
from kvcache.profiles import open_stack
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from tests.support import redis_servers
from tests.support.redis_servers import Server
from tests.support.stack_under_test import LONG


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def test_engines_that_write_the_same_blocks_at_once_leave_one_of_each(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.client().flushall()
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE__REDIS__URL", server.url)
    monkeypatch.setenv("KVCACHE__REDIS__TIMEOUT_S", "30")
    monkeypatch.setenv("KVCACHE__REDIS__DEADLINE_S", "30")
    keys, engines = keys_of("a", 40), 3
    start = threading.Barrier(engines)

    def compute(stack: Stack) -> None:
        start.wait(LONG)
        for at in range(0, len(keys), 4):
            with stack.reserve(keys[at : at + 4], keys[at - 1] if at else None) as lease:
                for key, view in zip(lease.keys, lease.views, strict=True):
                    view[:] = block_of(key, PAGE)

    with ExitStack() as opened:
        stacks = [
            opened.enter_context(open_stack("l1-redis", block_nbytes=PAGE, namespace=b"s" * 32))
            for _ in range(engines)
        ]
        threads = [threading.Thread(target=compute, args=(stack,)) for stack in stacks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stack in stacks:
            assert stack.flush(LONG)
            [lower] = stack.stats().lower
            assert (lower.errors, lower.declined_blocks, lower.dropped_blocks) == (0, 0, 0)
            assert lower.stored_blocks + lower.known_blocks == len(keys)
        assert server.client().dbsize() == len(keys)
        stacks[0].front.clear()
        with stacks[0].fetch(stacks[0].match(keys).result(LONG)).result(LONG) as lease:
            assert [bytes(view) for view in lease.views] == [block_of(key, PAGE) for key in keys]
