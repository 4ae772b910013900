"""MooncakeTier over a played library: memory for RDMA, and memory shared with the host's daemon."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

pytest.importorskip("kvcache.tiers.mooncake")

from kvcache.testing import block_of, keys_of
from kvcache.tiers.framed import Framed
from kvcache.tiers.mooncake import MooncakeTier
from kvcache.tiers.mooncake.client import PoolClient
from kvcache.tiers.mooncake.memory import DaemonMemory, address_of
from tests.support.played_mooncake import (
    OpenPlayed,
    PlayedMaster,
    PlayedPool,
    play_library,
    tiers_on,
    wait_until_open,
)

NBYTES = 4096
PATIENCE_S = 30.0


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedPool:
    return play_library(monkeypatch)


@pytest.fixture
def master() -> Iterator[PlayedMaster]:
    with PlayedMaster() as master:
        yield master


@pytest.fixture
def opened(played: PlayedPool, master: PlayedMaster) -> Iterator[OpenPlayed]:
    with tiers_on(played, master) as opened:
        yield opened


# RDMA


def test_rdma_registers_each_allocated_memory_once(opened: OpenPlayed, played: PlayedPool) -> None:
    played.only_registered = True
    tier = opened(protocol="rdma")
    view = tier.allocate(4 * NBYTES)
    assert view is not None
    assert (len(view), view.readonly, address_of(view) % 4096) == (4 * NBYTES, False, 0)
    keys = keys_of("rdma", 3)
    buffers = [view[at * NBYTES : (at + 1) * NBYTES] for at in range(3)]
    for key, buffer in zip(keys, buffers, strict=True):
        buffer[:] = block_of(key, NBYTES)
    assert tier.store(keys, buffers) == [True] * 3
    for _ in range(3):
        view[:] = bytes(len(view))
        assert tier.load(keys, buffers) == [NBYTES] * 3
        assert [bytes(buffer) for buffer in buffers] == [block_of(key, NBYTES) for key in keys]
    assert played.called("register_buffer") == [(address_of(view), len(view))]
    for _, addresses, _ in played.called("batch_get_into"):
        assert addresses == [address_of(buffer) for buffer in buffers], "the tier copied"


def test_rdma_registers_the_memory_again_with_a_new_client(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    tier = opened(protocol="rdma")
    view = tier.allocate(NBYTES)
    assert view is not None
    tier.abandoned_transfer_s = 0.0
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [-800]
    with pytest.raises(ConnectionError):
        tier.load(keys_of("rdma", 1), [view])
    wait_until_open(tier)
    assert played.called("register_buffer") == [(address_of(view), NBYTES)] * 2


def test_framed_packs_into_memory_of_the_tier(opened: OpenPlayed, played: PlayedPool) -> None:
    played.only_registered = True
    inner = opened(protocol="rdma")
    keys = keys_of("framed", 3)
    with closing(Framed(inner, block_nbytes=NBYTES)) as tier:
        tier.store(keys, [memoryview(block_of(key, NBYTES)) for key in keys])
        [(start, nbytes)] = played.called("register_buffer")
        buffers = [bytearray(NBYTES) for _ in keys]
        assert tier.load(keys, [memoryview(each) for each in buffers]) == [NBYTES] * 3
        assert buffers == [block_of(key, NBYTES) for key in keys]
        own = inner.allocate(NBYTES)
        assert own is not None
        assert inner.store(keys[:1], [memoryview(bytes(NBYTES))]) == [True]
    assert len(played.called("register_buffer")) == 3, "the tier had made staging memory before"
    for method in ("batch_put_from", "batch_get_into"):
        addresses = played.called(method)[0][1]
        assert all(start <= address < start + nbytes for address in addresses)


def test_allocate_before_the_client_is_open_raises(
    played: PlayedPool, master: PlayedMaster
) -> None:
    played.setup_code = -600
    with (
        closing(MooncakeTier(master=master.address, timeout_s=30.0, protocol="rdma")) as tier,
        pytest.raises(ConnectionError, match="is not open: Mooncake cannot open a client"),
    ):
        tier.allocate(4096)


def test_memory_that_cannot_be_registered_is_used_for_the_next_call(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    """A call that fails because of a limit must not take more memory each time."""
    tier = opened(protocol="rdma")
    played.replies["register_buffer"] = lambda address, nbytes: -600
    for _ in range(2):
        with pytest.raises(ConnectionError, match="cannot register memory"):
            tier.allocate(NBYTES)
    del played.replies["register_buffer"]
    views = [tier.allocate(NBYTES), tier.allocate(NBYTES)]
    addresses = [address for address, _ in played.called("register_buffer")]
    assert addresses[0] == addresses[1] == addresses[2] != addresses[3]
    assert [address_of(view) for view in views if view is not None] == addresses[2:]


def test_address_of_read_only_memory_is_that_of_its_bytes() -> None:
    buffer = bytearray(b"0123456789")
    view = memoryview(buffer)
    assert address_of(view[3:]) == address_of(view) + 3
    assert address_of(view.toreadonly()) == address_of(view)
    with pytest.raises(BufferError):
        address_of(view[::2])


# The host's daemon


def test_load_without_answer_returns_when_the_daemon_lets_go_of_the_memory(
    opened: OpenPlayed, played: PlayedPool, master: PlayedMaster
) -> None:
    """A daemon that hung during a load executes it when it continues."""
    played.only_registered = True
    tier = opened(daemon=master.address)
    view = tier.allocate(NBYTES)
    assert view is not None
    key = keys_of("daemon", 1)[0]
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [-900]
    asked, lets_go = threading.Semaphore(0), threading.Event()

    def unregister(address: int) -> int:
        asked.release()
        return 0 if lets_go.is_set() else -900

    played.replies["unregister_buffer"] = unregister
    ended = threading.Event()

    def load() -> None:
        with pytest.raises(ConnectionError):
            tier.load([key], [view])
        ended.set()

    thread = threading.Thread(target=load)
    thread.start()
    assert asked.acquire(timeout=PATIENCE_S)
    assert asked.acquire(timeout=PATIENCE_S)
    assert not ended.is_set()
    lets_go.set()
    assert ended.wait(PATIENCE_S)
    thread.join()
    del played.replies["batch_get_into"], played.replies["unregister_buffer"]
    played.clients[0].registered.clear()
    view[:] = block_of(key, NBYTES)
    assert tier.store([key], [view]) == [True], "the memory was not registered again"


def test_transfer_that_failed_in_the_daemon_keeps_the_memory(
    opened: OpenPlayed, played: PlayedPool, master: PlayedMaster
) -> None:
    tier = opened(daemon=master.address)
    view = tier.allocate(NBYTES)
    assert view is not None
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [-800]
    with pytest.raises(ConnectionError, match="-800"):
        tier.load(keys_of("daemon", 1), [view])
    assert played.called("unregister_buffer") == []


def test_memory_that_a_restarted_daemon_lost_is_copied_from_then_on(
    opened: OpenPlayed, played: PlayedPool, master: PlayedMaster
) -> None:
    played.only_registered = True
    tier = opened(daemon=master.address)
    key, other = keys_of("restarted", 2)
    view = tier.allocate(NBYTES)
    assert view is not None
    foreign = memoryview(bytearray(block_of(other, NBYTES)))
    view[:] = block_of(key, NBYTES)
    assert tier.store([key, other], [view, foreign]) == [True, True]
    played.clients[0].registered.clear()
    for buffer in (view, foreign):
        with pytest.raises(ConnectionError, match="lost the shared memory"):
            tier.load([key], [buffer])
    for buffer in (view, foreign):
        buffer[:] = bytes(NBYTES)
        assert tier.load([key], [buffer]) == [NBYTES]
        assert buffer == block_of(key, NBYTES)


def test_memory_that_cannot_be_unregistered_holds_up_no_call() -> None:
    with PlayedMaster() as daemon:
        pool = PlayedPool()
        client = PoolClient(pool.library(1.0)())
        memory = DaemonMemory(("127.0.0.1", daemon.port), 30.0, unread_request_s=0.0)
        view = memory.allocate(client, 4096)
        pool.replies["unregister_buffer"] = lambda address: -1
        memory.wait_quiet(client, [view])
    assert len(pool.called("unregister_buffer")) == 1


def test_memory_of_a_daemon_that_ended_is_quiet() -> None:
    with PlayedMaster() as daemon:
        pool = PlayedPool()
        client = PoolClient(pool.library(1.0)())
        memory = DaemonMemory(("127.0.0.1", daemon.port), 30.0, unread_request_s=0.0)
        view = memory.allocate(client, 4096)
    pool.replies["unregister_buffer"] = lambda address: -900
    memory.wait_quiet(client, [view])
    assert len(pool.called("unregister_buffer")) == 1
