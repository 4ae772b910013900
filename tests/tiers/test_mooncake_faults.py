"""MooncakeTier in a real pool, of which parts are killed, full, or used by another client."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import mooncake_pool
from tests.support.checked_loads import CLEAN, NBYTES, blocks, loaded

pytest.importorskip("kvcache.tiers.mooncake")

from kvcache.testing import block_of, keys_of
from kvcache.tiers.framed import Framed, frame_nbytes
from kvcache.tiers.mooncake import MooncakeTier, block_name
from tests.support.mooncake_pool import Pool
from tests.support.waiting import eventually


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with mooncake_pool.pool(tmp_path) as pool:
        yield pool


@pytest.fixture
def tier(pool: Pool) -> Iterator[MooncakeTier]:
    with closing(MooncakeTier(**pool.options())) as tier:
        yield tier


def raises_unreachable(tier: MooncakeTier, keys: Sequence[bytes]) -> bool:
    """Whether a lookup raises ConnectionError."""
    try:
        tier.contains(keys)
    except ConnectionError:
        return True
    return False


def recovers(tier: MooncakeTier, keys: Sequence[bytes]) -> bool:
    """Whether the tier stores and loads ``keys`` now."""
    try:
        return all(tier.store(keys, blocks(keys))) and all(loaded(tier, keys))
    except ConnectionError:
        return False


# What another client does


def test_block_of_another_client_is_loaded(tier: MooncakeTier, pool: Pool) -> None:
    namespace, key = keys_of("namespace", 1)[0], keys_of("key", 1)[0]
    name = f"kvcache:1:{namespace.hex()}:{key.hex()}"
    assert block_name(namespace + key) == name
    pool.holders[0].put(name, block_of(namespace + key, NBYTES))
    assert loaded(tier, [namespace + key]) == [True]


def test_thousands_of_small_blocks_in_one_call_are_stored_and_loaded(tier: MooncakeTier) -> None:
    keys = keys_of("small", 4096)
    assert all(tier.store(keys, [memoryview(key) for key in keys]))
    buffers = [bytearray(len(key)) for key in keys]
    assert all(tier.load(keys, [memoryview(each) for each in buffers]))
    assert buffers == keys


def test_two_clients_keep_the_first_block(tier: MooncakeTier, pool: Pool) -> None:
    keys = keys_of("shared", 4)
    with closing(MooncakeTier(**pool.options())) as other:
        assert all(tier.store(keys, blocks(keys)))
        assert all(other.store(keys, [memoryview(CLEAN)] * 4))
        assert all(loaded(other, keys))


def test_value_longer_than_the_buffer_is_a_miss_and_replaced(
    tier: MooncakeTier, pool: Pool
) -> None:
    [key, other] = keys_of("long", 2)
    pool.holders[0].put(block_name(key), bytes(NBYTES + 1))
    tier.store([other], blocks([other]))
    assert loaded(tier, [key, other]) == [False, True]
    assert tier.store([key], blocks([key])) == [True]
    assert loaded(tier, [key, other]) == [True, True]


def test_leased_block_is_gone_after_remove_and_replaced_by_the_next_store(
    tier: MooncakeTier, pool: Pool
) -> None:
    [key] = keys_of("leased", 1)
    pool.holders[0].put(block_name(key), bytes(NBYTES))
    assert tier.contains([key]) == [True]  # this leases it
    tier.remove([key])
    assert pool.holders[0].exists(block_name(key)), "a leased block was removed by force"
    assert tier.contains([key, key]) == [False, False]
    assert loaded(tier, [key]) == [False]
    assert tier.store([key], blocks([key])) == [True]
    assert loaded(tier, [key]) == [True]
    assert pool.holders[0].get(block_name(key)) == block_of(key, NBYTES)


@pytest.mark.parametrize("damage", ["swapped", "cut", "zeros"])
def test_damaged_frame_is_a_miss_and_replaced(pool: Pool, damage: str) -> None:
    key, other = keys_of("damaged", 2)
    inner = MooncakeTier(**pool.options())
    with closing(Framed(inner, block_nbytes=NBYTES)) as tier:
        tier.store([other], blocks([other]))
        frame = pool.holders[0].get(block_name(other))
        assert len(frame) == frame_nbytes(NBYTES)
        wrong = {"swapped": frame, "cut": frame[: NBYTES // 2], "zeros": bytes(len(frame))}
        pool.holders[0].put(block_name(key), wrong[damage])
        assert loaded(tier, [key, other]) == [False, True]
        assert sum(tier.stats().rejected.values()) == 1
        assert loaded(tier, [key]) == [False]
        assert sum(tier.stats().rejected.values()) == 1, "the damaged block was loaded again"
        tier.store([key], blocks([key]))
        assert loaded(tier, [key, other]) == [True, True]


def test_pool_full_of_leased_blocks_declines_and_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        mooncake_pool.pool(tmp_path, holders=[16 << 20], lease_ms=60_000) as pool,
        closing(MooncakeTier(**pool.options())) as tier,
        caplog.at_level(logging.WARNING),
    ):
        held, declined = [], 0
        for key in keys_of("full", 400):
            declined += tier.store([key], blocks([key])) == [False]
            if tier.contains([key]) == [True]:  # this leases it
                held.append(key)
        assert held
        assert tier.usage().declined_blocks == {"no room": declined}
        assert all(loaded(tier, held))
        warnings = [record.getMessage() for record in caplog.records]
        text = (
            "kvcache: mooncake: the pool returned an error (-200: the pool has no free memory); "
            "its keys are missed or declined"
        )
        assert warnings == [text]


def test_full_pool_stores_again_when_leases_end(tmp_path: Path) -> None:
    with (
        mooncake_pool.pool(tmp_path, holders=[16 << 20], lease_ms=500) as pool,
        closing(MooncakeTier(**pool.options())) as tier,
    ):
        keys = keys_of("full", 400)
        for key in keys:
            tier.store([key], blocks([key]))
        held = [key for key in keys if tier.contains([key]) == [True]]  # this leases them
        assert held
        more, stored = [[key] for key in keys_of("more", 10_000)], []

        def stored_more_than_fits() -> bool:
            key = more.pop()
            stored.extend(tier.store(key, blocks(key)))
            return sum(stored) > (16 << 20) // NBYTES

        eventually(stored_more_than_fits, "the pool evicts and stores")


# What dies


def test_killed_master_raises_and_a_new_one_is_used(
    tier: MooncakeTier, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("before", 4)
    assert recovers(tier, keys)
    with caplog.at_level(logging.WARNING):
        pool.master.kill()
        with pytest.raises(ConnectionError, match="batch_is_exist"):
            tier.contains(keys)
        with pytest.raises(ConnectionError, match="refused"):
            loaded(tier, keys)
        with pytest.raises(ConnectionError, match="refused"):
            tier.store(keys, blocks(keys))
        with pytest.raises(ConnectionError, match="refused"):
            tier.remove(keys)
        pool.master.start()
        eventually(lambda: recovers(tier, keys_of("after", 4)), "the tier recovers")
    texts = [record.getMessage() for record in caplog.records]
    lost, found = (text for text in texts if f"mooncake at {pool.master.address}" in text)
    assert "unreachable (batch_is_exist returned -900" in lost
    assert found.endswith("reachable again")


def test_killed_holder_loses_its_blocks_and_a_new_one_is_used(
    tier: MooncakeTier, pool: Pool
) -> None:
    keys = keys_of("holder", 4)
    assert recovers(tier, keys)
    pool.holders[0].kill()

    def lost() -> bool:
        try:
            return not any(loaded(tier, keys))
        except ConnectionError:
            return True

    eventually(lost, "the blocks are lost")
    pool.holders[0].start()
    eventually(lambda: recovers(tier, keys_of("later", 4)), "the new memory is used")


def test_engine_starts_without_a_master_and_uses_it_when_it_comes(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.kill()
    keys = keys_of("later", 4)
    with (
        caplog.at_level(logging.WARNING),
        closing(MooncakeTier(**pool.options())) as tier,
    ):
        for call in (
            lambda: tier.contains(keys),
            lambda: loaded(tier, keys),
            lambda: tier.store(keys, blocks(keys)),
            lambda: tier.remove(keys),
        ):
            with pytest.raises(ConnectionError, match="is not open"):
                call()
        pool.start()
        eventually(lambda: recovers(tier, keys), "the tier opens")
        assert [record.getMessage().rpartition(": ")[2][:11] for record in caplog.records]
    unreachable, again = (record.getMessage() for record in caplog.records)
    assert "unreachable" in unreachable
    assert again.endswith("reachable again")


def test_closed_tier_raises_instead_of_calling_the_library(pool: Pool) -> None:
    tier = MooncakeTier(**pool.options())
    tier.close()
    keys = keys_of("closed", 1)
    for call in (
        lambda: tier.contains(keys),
        lambda: loaded(tier, keys),
        lambda: tier.store(keys, blocks(keys)),
        lambda: tier.remove(keys),
        lambda: tier.allocate(4096),
    ):
        with pytest.raises(ConnectionError, match="the tier is closed"):
            call()


def test_tier_closed_before_the_master_comes_opens_nothing(pool: Pool) -> None:
    pool.master.kill()
    tier = MooncakeTier(**pool.options())
    tier.close()
    pool.master.start()
    assert raises_unreachable(tier, keys_of("closed", 1))
