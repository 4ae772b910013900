"""MooncakeTier over a played library: batches, codes, and races that a real one hides."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar

import pytest

pytest.importorskip("kvcache.tiers.mooncake")

from kvcache.sizes import Size
from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers.mooncake import MooncakeTier, block_name
from kvcache.tiers.mooncake.client import PoolClient
from kvcache.tiers.mooncake.gone_keys import GoneKeys
from kvcache.tiers.mooncake.tier import MAX_TRANSFERS
from tests.support.played_mooncake import (
    HangingMaster,
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


def store(tier: MooncakeTier, keys: list[bytes]) -> list[bool]:
    return tier.store(keys, [memoryview(block_of(key, NBYTES)) for key in keys])


class PlayedTierTests(TierTests):
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def tier(self, opened: OpenPlayed) -> MooncakeTier:
        return opened(**self.options)


class TestPlayedMooncake(PlayedTierTests):
    pass


class TestPlayedRdma(PlayedTierTests):
    """Memory must be registered, so the tier copies the buffers of this suite."""

    options: ClassVar[dict[str, Any]] = {"protocol": "rdma", "devices": "mlx5_0"}

    @pytest.fixture(autouse=True)
    def _only_registered(self, played: PlayedPool) -> None:
        played.only_registered = True


class TestPlayedMooncakeLeased(PlayedTierTests):
    """Every block is leased, so none can be removed."""

    @pytest.fixture(autouse=True)
    def _leased(self, played: PlayedPool) -> None:
        class Everything(set[str]):
            def __contains__(self, name: object) -> bool:
                return name in played.values

        played.leased = Everything()


# A key once in each batch, no removal by force


def test_batch_with_a_key_twice_is_sent_once(opened: OpenPlayed, played: PlayedPool) -> None:
    tier = opened()
    key, other = keys_of("twice", 2)
    zeros = memoryview(bytes(NBYTES))
    first = memoryview(block_of(key, NBYTES))
    assert tier.store([key, other, key], [first, zeros, zeros]) == [True] * 3
    buffers = [bytearray(NBYTES) for _ in range(3)]
    assert tier.load([key, other, key], [memoryview(each) for each in buffers]) == [NBYTES] * 3
    assert buffers[0] == buffers[2] == block_of(key, NBYTES)
    tier.remove([key, key])
    for method in ("batch_put_from", "batch_get_into", "batch_remove"):
        [(names, *_)] = played.called(method)
        assert len(names) == len(set(names))


def test_many_small_blocks_are_transferred_in_parts(opened: OpenPlayed, played: PlayedPool) -> None:
    tier = opened()
    keys = keys_of("many", MAX_TRANSFERS + 2)
    assert tier.store(keys, [memoryview(key) for key in keys]) == [True] * len(keys)
    buffers = [bytearray(len(key)) for key in keys]
    assert all(tier.load(keys, [memoryview(each) for each in buffers]))
    assert buffers == keys
    for method in ("batch_put_from", "batch_get_into"):
        assert [len(names) for names, *_ in played.called(method)] == [MAX_TRANSFERS, 2]


def test_parts_of_a_transfer_end_at_the_first_without_an_answer(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    tier = opened()
    keys = keys_of("unanswered", 3 * MAX_TRANSFERS)
    played.replies["batch_put_from"] = lambda names, addresses, sizes: [-900] * len(names)
    with pytest.raises(ConnectionError, match="-900"):
        tier.store(keys, [memoryview(key) for key in keys])
    assert len(played.called("batch_put_from")) == 1


def test_remove_is_never_by_force(opened: OpenPlayed, played: PlayedPool) -> None:
    tier = opened()
    keys = keys_of("forced", 2)
    store(tier, keys)
    played.leased = {block_name(keys[0])}
    tier.remove(keys)
    assert [force for _, force in played.called("batch_remove")] == [False]
    assert tier.contains(keys) == [False, False]
    assert list(played.values) == [block_name(keys[0])]
    assert store(tier, keys) == [True, True]
    assert [names for names, *_ in played.called("batch_upsert_from")] == [[block_name(keys[0])]]
    assert tier.contains(keys) == [True, True]


def test_gone_keys_are_bounded_and_the_oldest_leave_first() -> None:
    gone = GoneKeys(limit=3)
    gone.add(keys_of("first", 3))
    gone.add(keys_of("first", 1))  # now the newest
    gone.add(keys_of("second", 2))
    assert len(gone) == 3
    assert gone.split([*keys_of("first", 3), *keys_of("second", 2)]) == (
        keys_of("first", 3)[1:],
        [*keys_of("first", 1), *keys_of("second", 2)],
    )


# Codes


@pytest.mark.parametrize("code", [-1, -800, -900, -901])
def test_code_for_every_key_that_means_no_answer_raises(
    opened: OpenPlayed, played: PlayedPool, code: int
) -> None:
    tier = opened()
    keys = keys_of("codes", 2)
    for method in ("batch_is_exist", "batch_get_into", "batch_put_from", "batch_remove"):
        played.replies[method] = lambda names, *_: [code] * len(names)
    buffers = [memoryview(bytearray(NBYTES)) for _ in keys]
    for call in (
        lambda: tier.contains(keys),
        lambda: tier.load(keys, buffers),
        lambda: store(tier, keys),
        lambda: tier.remove(keys),
    ):
        with pytest.raises(ConnectionError, match=f"returned {code}"):
            call()


@pytest.mark.parametrize("code", [-200, -600, -704, -706, -707, -800, -801, -900, -1700, -9999])
def test_code_for_one_key_is_a_miss_or_a_decline(
    opened: OpenPlayed, played: PlayedPool, code: int
) -> None:
    tier = opened()
    keys = keys_of("codes", 2)
    played.replies["batch_is_exist"] = lambda names: [code, 1]
    assert tier.contains(keys) == [False, True]
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [code, NBYTES]
    buffers = [memoryview(bytearray(NBYTES)) for _ in keys]
    assert tier.load(keys, buffers) == [0, NBYTES]
    played.replies["batch_put_from"] = lambda names, addresses, sizes: [code, 0][: len(names)]
    played.replies["batch_upsert_from"] = lambda names, addresses, sizes: [code]
    assert store(tier, keys) == [False, code != -801 and True]
    assert sum(tier.usage().declined_blocks.values()) == 1 + (code == -801)
    name = {-200: "no room", -706: "leased", -800: "no answer", -1700: "quota"}.get(code, str(code))
    if code not in (-801, -900):
        assert set(tier.usage().declined_blocks) == {name}


def test_key_that_another_client_is_writing_counts_as_held(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    played.replies["batch_put_from"] = lambda names, addresses, sizes: [-705]
    assert store(opened(), keys_of("exists", 1)) == [True]


def test_empty_block_is_declined_and_logged_once(
    opened: OpenPlayed, caplog: pytest.LogCaptureFixture
) -> None:
    tier = opened()
    for _ in range(2):
        assert tier.store(keys_of("empty", 1), [memoryview(b"")]) == [False]
    assert tier.usage().declined_blocks == {"empty": 2}
    [message] = [record.getMessage() for record in caplog.records]
    assert message == "kvcache: mooncake: a block is empty; such blocks are declined"


# The start


def test_library_is_not_asked_to_open_a_client_while_the_master_hangs(played: PlayedPool) -> None:
    """The library holds the GIL meanwhile, so the whole engine would stand still."""
    with HangingMaster() as master:
        address = f"127.0.0.1:{master.port}"
        with closing(MooncakeTier(master=address, timeout_s=0.01)) as tier:
            while len(master.sockets) < 2:
                threading.Event().wait(0.01)
            with pytest.raises(ConnectionError, match="is not open: timed out"):
                tier.contains(keys_of("hangs", 1))
    assert played.clients == []


def test_library_that_fails_to_open_a_client_is_asked_again(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    codes = [-600, -1]
    played.replies["setup"] = lambda settings: codes.pop(0) if codes else 0
    wait_until_open(opened())
    assert len(played.clients) == 3


def test_library_that_raises_in_setup_is_asked_again(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    errors = [RuntimeError("no"), MemoryError()]

    def setup(settings: dict[str, Any]) -> int:
        if errors:
            raise errors.pop(0)
        return 0

    played.replies["setup"] = setup
    wait_until_open(opened())
    assert errors == []


def test_setup_gets_the_options(opened: OpenPlayed, played: PlayedPool) -> None:
    opened(share=Size(1 << 20), hostname="engine.example", protocol="rdma", devices="mlx5_0")
    [(settings,)] = played.called("setup")
    assert settings["local_hostname"] == "engine.example"
    assert settings["global_segment_size"] == 1 << 20
    assert settings["protocol"] == "rdma"
    assert settings["rdma_devices"] == "mlx5_0"


def test_hostname_is_by_default_the_address_on_the_way_to_the_master(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    opened()
    [(settings,)] = played.called("setup")
    assert settings["local_hostname"] == "127.0.0.1"


# The gate before close


def test_close_waits_for_the_calls_inside(played: PlayedPool, master: PlayedMaster) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang(names: list[str]) -> list[int]:
        entered.set()
        assert leave.wait(PATIENCE_S)
        return [1] * len(names)

    played.replies["batch_is_exist"] = hang
    tier = MooncakeTier(master=master.address, timeout_s=30.0)
    keys, answers = keys_of("gate", 1), []
    thread = threading.Thread(target=lambda: answers.append(tier.contains(keys)))
    thread.start()
    assert entered.wait(PATIENCE_S)
    tier.close()  # returns although a call is inside
    [client] = played.clients
    assert not client.closed
    with pytest.raises(ConnectionError, match="the tier is closed"):
        tier.contains(keys)
    leave.set()
    thread.join(PATIENCE_S)
    assert answers == [[True]]
    assert client.closed
    assert played.violations == []


def test_close_during_setup_closes_the_new_client(played: PlayedPool, master: PlayedMaster) -> None:
    entered, leave = threading.Event(), threading.Event()

    def setup(settings: dict[str, Any]) -> int:
        entered.set()
        assert leave.wait(PATIENCE_S)
        return 0

    played.replies["setup"] = setup
    tier = MooncakeTier(master=master.address, timeout_s=0.01)
    assert entered.wait(PATIENCE_S)
    tier.close()
    leave.set()
    [client] = played.clients
    for _ in range(int(PATIENCE_S * 100)):
        if client.closed:
            break
        threading.Event().wait(0.01)
    assert client.closed


def test_client_closes_its_library_client_once() -> None:
    pool = PlayedPool()
    client = PoolClient(pool.library(1.0)())
    client.close()
    client.close()
    client.wait_closed()
    with pytest.raises(ConnectionError):
        client.call("batch_is_exist", ["name"])
    assert pool.violations == []


# A transfer that the library stopped waiting for


def test_transfer_that_may_go_on_closes_the_client_before_the_call_ends(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    tier = opened()
    tier.abandoned_transfer_s = 0.0
    key = keys_of("abandoned", 1)[0]
    store(tier, [key])
    [first] = played.clients
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [-800]
    with pytest.raises(ConnectionError):
        tier.load([key], [memoryview(bytearray(NBYTES))])
    assert first.closed
    del played.replies["batch_get_into"]
    wait_until_open(tier)
    assert len(played.clients) == 2
    assert tier.load([key], [memoryview(bytearray(NBYTES))]) == [NBYTES]


def test_abandoned_load_ends_only_after_the_client_was_closed(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    tier = opened()
    tier.abandoned_transfer_s = 0.0
    entered, leave, closed = threading.Event(), threading.Event(), []

    def hang(names: list[str]) -> list[int]:
        entered.set()
        assert leave.wait(PATIENCE_S)
        return [0] * len(names)

    def load() -> None:
        with pytest.raises(ConnectionError):
            tier.load(keys_of("abandoned", 1), [memoryview(bytearray(NBYTES))])
        closed.append(played.clients[0].closed)

    played.replies["batch_is_exist"] = hang
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [-800]
    lookup = threading.Thread(target=lambda: tier.contains(keys_of("other", 1)))
    lookup.start()
    assert entered.wait(PATIENCE_S)
    loading = threading.Thread(target=load)
    loading.start()
    while True:  # until the load has closed the gate
        try:
            tier.remove(keys_of("gate", 1))
        except ConnectionError:
            break
    leave.set()
    for thread in (lookup, loading):
        thread.join(PATIENCE_S)
    assert closed == [True]
    del played.replies["batch_is_exist"]


def test_quick_failure_of_a_transfer_keeps_the_client(
    opened: OpenPlayed, played: PlayedPool
) -> None:
    tier = opened()
    played.replies["batch_get_into"] = lambda names, addresses, sizes: [-800]
    with pytest.raises(ConnectionError):
        tier.load(keys_of("quick", 1), [memoryview(bytearray(NBYTES))])
    assert len(played.clients) == 1
    assert not played.clients[0].closed
