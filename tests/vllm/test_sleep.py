"""Sleep mode: vLLM discards its KV cache, and may have the workers describe it again."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.vllm import KVCacheConnector
from kvcache.connectors.vllm.messages import Refusal, SlabShards, Step, Transfer
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from kvcache.connectors.vllm.vllm_names import has_name
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.slab import Slab, slot_nbytes_for
from tests.support.played_engine import cache_config, engine_config, full_attention, shards
from tests.support.recording_worker import one_piece, side
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine

BLOCKS = 16
BASE = "distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"


class SleepingRank:
    """A rank with one layer, its connector, and a slab of as many slots as blocks."""

    def __init__(self, device: ReorderingDevice | None, *, defers_stores: bool) -> None:
        self.device = device
        self.cache = torch.randint(0, 256, (BLOCKS, 512), dtype=torch.uint8)
        self.worker: WorkerSide = side(layers=["one"], device=device, defers_stores=defers_stores)
        self.connector = KVCacheConnector.__new__(KVCacheConnector)
        self.connector.worker_side = self.worker
        self.connector.refusal = None
        self.connector.register_kv_caches({"one": self.cache})
        self.slab = Slab.create(BLOCKS, slot_nbytes_for(512))
        self.memory: SlabShards = one_piece(self.slab.descriptor, 512)

    def slot(self, number: int) -> bytes:
        return bytes(self.slab.view(number)[:512])

    def page(self, block: int) -> bytes:
        return bytes(self.cache[block].numpy().tobytes())

    def start(self, step: Step) -> None:
        self.worker.fence(step)
        self.worker.load(step)
        self.worker.store(step)

    def run(self, step: Step) -> set[int]:
        """Run a step and all its copies; return the jobs that failed."""
        self.start(step)
        self.worker.fence(Step(self.memory))
        if self.device is not None:
            self.device.drain()
        self.worker.take_received()
        acks = self.worker.take_acks()
        assert acks is not None
        assert set(acks.ranks) == {job.job for job in (*step.loads, *step.stores)}
        return acks.failed

    def close(self) -> None:
        self.worker.close()
        self.slab.close()


@pytest.fixture(params=[None, *range(5)], ids=lambda seed: "cpu" if seed is None else f"{seed}")
def rank(request: pytest.FixtureRequest) -> Iterator[SleepingRank]:
    """A rank on the CPU, or on a device that does its work in any order that events allow."""
    seed = request.param
    device = None if seed is None else ReorderingDevice(Random(seed))
    rank = SleepingRank(device, defers_stores=seed in (1, 3))
    yield rank
    rank.close()


def test_unregister_kv_caches_waits_for_running_copies(rank: SleepingRank) -> None:
    page = rank.page(3)
    rank.start(Step(rank.memory, stores=[Transfer(1, [3], [5])], number=1))
    rank.connector.unregister_kv_caches()
    rank.cache.fill_(0)  # no copy may read this
    if rank.device is not None:
        rank.device.drain()
    assert rank.slot(5) == page
    rank.worker.take_received()
    acks = rank.worker.take_acks()
    assert acks is not None
    assert (acks.ranks, acks.failed) == ({1: 1}, set())


def test_copies_between_unregister_and_restore_fail_and_touch_no_page(rank: SleepingRank) -> None:
    assert rank.run(Step(rank.memory, stores=[Transfer(1, [3], [5])], number=1)) == set()
    rank.connector.unregister_kv_caches()
    rank.connector.unregister_kv_caches()  # vLLM may call it twice
    before = rank.cache.clone(), rank.slot(6)
    load = Transfer(2, [4], [5])
    later = Transfer(3, [7], [5], awaited_by="waits")
    asked = Step(rank.memory, loads=[load, later], stores=[Transfer(4, [3], [6])])
    assert rank.run(asked) == {2, 3, 4}
    assert rank.connector.get_block_ids_with_load_errors() == {4, 7}
    assert torch.equal(rank.cache, before[0])
    assert rank.slot(6) == before[1]


@pytest.mark.parametrize("moved", [False, True])
def test_restore_kv_caches_copies_at_the_addresses_of_that_time(
    moved: bool, rank: SleepingRank
) -> None:
    assert rank.run(Step(rank.memory, stores=[Transfer(1, [3], [5])], number=1)) == set()
    page, shard = rank.page(3), rank.connector.worker_side.shard()
    rank.connector.unregister_kv_caches()
    at, before = rank.cache.data_ptr(), rank.cache.clone()
    keeps_the_old_memory = rank.cache.untyped_storage()
    if moved:
        rank.cache.set_(torch.zeros_like(rank.cache))
    rank.cache.zero_()
    rank.connector.restore_kv_caches()
    rank.connector.restore_kv_caches()  # vLLM may call it twice
    assert rank.connector.worker_side.shard() == shard
    assert rank.run(Step(rank.memory, loads=[Transfer(2, [8], [5])], number=2)) == set()
    assert rank.page(8) == page
    assert (rank.cache.data_ptr() != at) == moved
    if moved:
        assert bytes(keeps_the_old_memory) == before.numpy().tobytes()


def test_restore_kv_caches_without_unregister_changes_nothing(rank: SleepingRank) -> None:
    rank.run(Step(rank.memory, stores=[Transfer(1, [3], [5])], number=1))
    copier = rank.worker.copier
    rank.connector.restore_kv_caches()
    assert rank.worker.copier is copier


def test_sleep_hooks_of_a_refused_engine_do_nothing() -> None:
    connector = KVCacheConnector.__new__(KVCacheConnector)
    connector.refusal = "the reason"
    connector.unregister_kv_caches()
    connector.restore_kv_caches()


# The repeated handshake


@pytest.fixture
def scheduler() -> Iterator[SchedulerSide]:
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    side.open(shards())
    yield side
    side.close()


def test_open_with_an_equal_handshake_keeps_the_stack(scheduler: SchedulerSide) -> None:
    stack = scheduler.stack
    scheduler.open(shards())
    assert scheduler.stack is stack


@pytest.mark.parametrize("other", [{}, {(0, 0): Refusal("the reason")}, shards("elsewhere")])
def test_open_with_another_handshake_raises(scheduler: SchedulerSide, other: Any) -> None:
    with pytest.raises(RuntimeError, match="the workers describe other blocks than at the start"):
        scheduler.open(other)


def test_open_with_a_repeated_refusal_stays_off(caplog: pytest.LogCaptureFixture) -> None:
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    for _ in range(2):
        side.open({(0, 0): Refusal("the reason"), (0, 1): Refusal("the reason")})
    assert side.refusal == "the reason"
    assert len([each for each in caplog.records if "connector: off" in each.getMessage()]) == 1


# Whether vLLM may sleep


@pytest.mark.skipif(
    not has_name(f"{BASE}.supports_sleep_mode"), reason="vLLM before 0.33 does not ask connectors"
)
@pytest.mark.parametrize("multi", [False, True])
def test_supports_sleep_mode_is_false_also_under_multi_connector(multi: bool) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    own = {
        "kv_connector": "KVCacheConnector",
        "kv_connector_module_path": "kvcache.connectors.vllm",
        "kv_role": "kv_both",
    }
    of_multi: Any = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [own]},
    }
    config = KVTransferConfig(**(of_multi if multi else own))
    assert KVConnectorFactory.get_connector_class(config).supports_sleep_mode(config) is False
