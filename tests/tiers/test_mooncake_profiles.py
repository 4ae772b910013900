"""The shipped profile with a Mooncake pool: stacks share blocks, and recompute lost ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import mooncake_pool

pytest.importorskip("kvcache.tiers.mooncake")
pytest.importorskip("xxhash")

from kvcache.keys import namespaced_key
from kvcache.stack import Stack
from kvcache.testing import keys_of
from kvcache.tiers.mooncake import block_name
from tests.support.mooncake_pool import Pool
from tests.support.profile_stacks import KEYS, NAMESPACE, check, load_prefix, opened_stack, store
from tests.support.waiting import eventually

Open = Callable[..., Stack]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with mooncake_pool.pool(tmp_path / "pool") as pool:
        yield pool


@pytest.fixture
def opened(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a stack of the profile for one engine, in the pool."""
    with ExitStack() as stacks:

        def opened(namespace: bytes = NAMESPACE, deadline_s: float = 30, **options: Any) -> Stack:
            monkeypatch.setenv("KVCACHE__L1__CAPACITY", "4MiB")
            monkeypatch.setenv("KVCACHE__MOONCAKE__DEADLINE_S", str(deadline_s))
            for name, value in pool.variables("mooncake", **options).items():
                monkeypatch.setenv(name, value)
            stack = stacks.enter_context(opened_stack("l1-mooncake", namespace))
            assert len(stack.stats().lower) == 1
            return stack

        yield opened


def recovers(stack: Stack, other: Stack, name: str) -> None:
    """Wait until blocks that ``stack`` stores now are loaded by ``other``."""
    more = [keys_of(f"{name} {at}", 1) for at in range(10_000)]

    def recovered() -> bool:  # the circuit breaker tries again after a second
        keys = more.pop()
        store(stack, keys)
        return load_prefix(other, keys) == 1

    eventually(recovered, "the pool is used again")


@pytest.mark.parametrize("options", [{}, {"share": "32MiB"}])
def test_stacks_in_one_pool_load_each_others_blocks(opened: Open, options: dict[str, Any]) -> None:
    first, second = opened(**options), opened(**options)
    store(first)
    assert load_prefix(second, [*KEYS, *keys_of("more", 2)]) == len(KEYS)
    assert load_prefix(opened(keys_of("other", 1)[0])) == 0
    store(opened())  # the pool has the blocks already
    check(first, len(KEYS))


def test_stacks_on_the_hosts_daemon_share_blocks(opened: Open, pool: Pool, tmp_path: Path) -> None:
    with mooncake_pool.daemon(tmp_path / "daemon", pool) as daemon:
        first, second = opened(daemon=daemon.address), opened(daemon=daemon.address)
        store(first)
        assert load_prefix(second) == len(KEYS)
        assert load_prefix(opened()) == len(KEYS)  # from the daemon's memory over TCP
        check(first, len(KEYS))


def test_reset_hides_old_blocks_and_logs_that_later_engines_may_find_them(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    store(first)
    with caplog.at_level(logging.WARNING):
        assert not first.clear()
    assert load_prefix(first) == 0
    [text] = [record.getMessage() for record in caplog.records]
    assert "a reset was not written (not supported)" in text
    assert load_prefix(opened()) == len(KEYS)  # docs/mooncake.md says so


@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_daemon_that_fails_costs_hits_and_recovers(
    opened: Open, pool: Pool, tmp_path: Path, fault: str
) -> None:
    with mooncake_pool.daemon(tmp_path / "daemon", pool) as daemon:
        first = opened(daemon=daemon.address)
        second = opened(daemon=daemon.address, deadline_s=0.2)
        store(first)
        if fault == "killed":
            daemon.kill()
            assert load_prefix(second) == 0
            daemon.start()
        else:
            with daemon.stopped():
                assert load_prefix(second) == 0
        assert second.stats().lower[0].errors > 0
        recovers(first, opened(), "again")  # the third stack has another way to the pool
        eventually(lambda: second.stats().pinned_slots == 0, "every slot comes back")
        recovers(second, first, "and back")


def test_damaged_value_ends_the_prefix_and_is_replaced(opened: Open, pool: Pool) -> None:
    first, second = opened(), opened()
    name = block_name(namespaced_key(NAMESPACE, KEYS[5]))
    pool.holders[0].put(name, b"damage" * 1000)
    store(first)
    assert load_prefix(second) == 5
    store(second)
    assert load_prefix(opened()) == len(KEYS)


def test_killed_master_costs_hits_and_recovers(opened: Open, pool: Pool) -> None:
    first, second = opened(), opened()
    store(first)
    pool.master.kill()
    assert load_prefix(second) == 0
    assert load_prefix(first) == len(KEYS)  # from L1
    store(second, keys_of("while it is down", 5))
    check(second, 5)
    pool.master.start()
    recovers(second, first, "again")


def test_engine_without_a_master_starts_and_recovers(opened: Open, pool: Pool) -> None:
    pool.master.kill()
    first, second = opened(), opened()
    store(first)
    assert load_prefix(second) == 0
    assert second.stats().lower[0].errors > 0
    check(first, len(KEYS))
    pool.master.start()
    recovers(first, second, "later")


@pytest.mark.parametrize("part", ["master", "holder"])
def test_part_that_hangs_stalls_no_request_and_keeps_no_slot(
    opened: Open, pool: Pool, part: str
) -> None:
    first, second = opened(), opened(deadline_s=0.2)
    store(first)
    hanging = pool.master if part == "master" else pool.holders[0]
    with hanging.stopped():
        assert load_prefix(second) == 0
        assert second.stats().lower[0].errors > 0
    eventually(lambda: second.stats().pinned_slots == 0, "every slot comes back")
    recovers(second, first, "after the hang")


def test_killed_holder_costs_hits_and_recovers(opened: Open, pool: Pool) -> None:
    first, second = opened(), opened()
    store(first)
    pool.holders[0].kill()
    assert load_prefix(second) == 0
    pool.holders[0].start()
    recovers(first, second, "new memory")
