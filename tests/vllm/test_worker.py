"""The worker's side: where pages lie, and that a failing copy is reported and not raised."""

from __future__ import annotations

import ctypes
import platform
from random import Random
from unittest.mock import ANY

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.vllm.messages import Acks, SlabShards, Step, Transfer
from kvcache.connectors.vllm.worker.pages import place_caches
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.slab import Slab, SlabDescriptor, slot_nbytes_for
from tests.support.recording_worker import NOWHERE, RecordingCopier, one_piece, side, step
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine

BLOCKS = 4


def block_bytes(cache: torch.Tensor, block: int) -> bytes:
    """Return the runs of a block, in their order."""
    pages = place_caches({"one": cache}, BLOCKS).runs()
    assert {page.count for page in pages} == {BLOCKS}
    return b"".join(
        ctypes.string_at(page.address + block * page.stride, page.nbytes) for page in pages
    )


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


# Where pages lie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_place_caches_contiguous_pages(dtype: torch.dtype) -> None:
    cache = torch.randint(0, 100, (BLOCKS, 2, 32, 8)).to(dtype)
    for block in range(BLOCKS):
        assert block_bytes(cache, block) == tensor_bytes(cache[block])


def test_place_caches_layers_of_one_storage() -> None:
    """vLLM registers views of one storage for all layers."""
    storage = torch.randint(0, 100, (3, BLOCKS, 2, 32, 8), dtype=torch.int16)
    for layer in range(3):
        assert block_bytes(storage[layer], 2) == tensor_bytes(storage[layer, 2])


def test_place_caches_interleaved_layers() -> None:
    """In a block-outermost layout, the pages of other layers lie between two of one layer."""
    storage = torch.randint(0, 100, (BLOCKS, 3, 2, 32, 8), dtype=torch.int16)
    for layer in range(3):
        [page] = place_caches({"one": storage[:, layer]}, BLOCKS).runs()
        assert page.stride == 3 * page.nbytes
        for block in range(BLOCKS):
            assert block_bytes(storage[:, layer], block) == tensor_bytes(storage[block, layer])


def test_place_caches_blocks_of_several_kernel_blocks() -> None:
    cache = torch.randint(0, 100, (BLOCKS * 4, 2, 32, 8), dtype=torch.int16)
    assert len(place_caches({"one": cache}, BLOCKS).runs()) == 1
    for block in range(BLOCKS):
        assert block_bytes(cache, block) == tensor_bytes(cache[4 * block : 4 * block + 4])


def test_place_caches_separate_kernel_blocks_are_pages_each() -> None:
    storage = torch.randint(0, 100, (BLOCKS * 2, 3, 2, 32, 8), dtype=torch.int16)
    cache = storage[:, 1]
    assert len(place_caches({"one": cache}, BLOCKS).runs()) == 2
    for block in range(BLOCKS):
        assert block_bytes(cache, block) == tensor_bytes(cache[2 * block : 2 * block + 2])


def test_place_caches_page_is_in_the_order_of_memory() -> None:
    """Heads come first in the shape and tokens in memory: the bytes keep the order of memory."""
    cache = torch.randint(0, 100, (BLOCKS, 32, 2, 8), dtype=torch.int16).transpose(1, 2)
    assert len(place_caches({"one": cache}, BLOCKS).runs()) == 1
    assert block_bytes(cache, 1) == tensor_bytes(cache[1].transpose(0, 1))


def test_place_caches_block_below_heads_has_a_page_for_each_head() -> None:
    """With heads outermost, every head of a block is a run."""
    cache = torch.randint(0, 100, (2, BLOCKS, 32, 8), dtype=torch.int16).transpose(0, 1)
    assert len(place_caches({"one": cache}, BLOCKS).runs()) == 2
    for block in range(BLOCKS):
        assert block_bytes(cache, block) == tensor_bytes(cache[block])


def test_register_cache_without_blocks_raises() -> None:
    with pytest.raises(RuntimeError, match=r"layer two, shape \(5, 2, 8\), .* is not 16 blocks"):
        side().register({"one": torch.zeros(16, 2, 8), "two": torch.zeros(5, 2, 8)})


def test_register_cache_with_overlapping_elements_raises() -> None:
    cache = torch.zeros(16, 1, 8).expand(16, 2, 8)
    with pytest.raises(RuntimeError, match=r"layer one is .* elements overlap"):
        side().register({"one": cache, "two": torch.zeros(16, 2, 8)})


def test_register_cache_on_an_unknown_device_raises() -> None:
    worker = side(layers=["one"])
    with pytest.raises(RuntimeError, match=r"the KV cache is on meta; .* CPUs and CUDA"):
        worker.register({"one": torch.zeros(16, 2, 8, device="meta")})


def test_format_id_has_the_order_of_a_page_and_the_host() -> None:
    def format_id(*shape: int, swap: bool = False) -> str:
        worker, cache = side(), torch.zeros(16, *shape)
        cache = cache.transpose(1, 2) if swap else cache
        worker.register({"one": cache, "two": torch.zeros(16, 2, 8)})
        shard = worker.shard()
        assert shard is not None
        return shard.format_id

    assert format_id(2, 32, 8) == format_id(2, 32, 8)
    others = [format_id(32, 2, 8), format_id(32, 2, 8, swap=True), format_id(2, 8, 32)]
    assert len({format_id(2, 32, 8), *others}) == 4
    assert platform.machine() in format_id(2, 32, 8)


# Copies


def play(worker: WorkerSide, what: Step) -> tuple[set[int], dict[int, int], set[int]]:
    """Run a step as vLLM's model runner does; return failed blocks, acks and failed jobs."""
    worker.load(what)
    worker.store(what)
    worker.take_received()
    bad, acks = worker.take_failed_blocks(), worker.take_acks()
    assert worker.take_acks() is None
    assert worker.take_failed_blocks() == set()
    return (bad, acks.ranks, acks.failed) if acks else (bad, {}, set())


def test_step_that_succeeds_acks_every_job() -> None:
    copier = RecordingCopier()
    assert play(side(copier), step()) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, set())
    assert copier.calls == [
        ("scatter", [0, 1, 2], [10, 11, 12]),
        ("gather", [13, 14, 15], [3, 4, 5]),
    ]


def test_loads_of_the_forward_pass_fail_together_with_the_stores() -> None:
    copier = RecordingCopier(0)
    assert play(side(copier), step()) == ({10, 11, 12}, {1: 1, 2: 1, 3: 1, 4: 1}, {1, 2, 3, 4})
    assert [name for name, *_ in copier.calls] == ["scatter"]


@pytest.mark.parametrize(
    ("fails", "bad", "failed"), [(0, {10}, {2}), (1, {9}, {1}), (2, {11}, {3})]
)
def test_async_load_fails_by_itself(fails: int, bad: set[int], failed: set[int]) -> None:
    copier = RecordingCopier(fails)
    loads = [
        Transfer(1, [9], [0], awaited_by="one"),
        Transfer(2, [10], [1]),
        Transfer(3, [11], [2], awaited_by="other"),
    ]
    assert play(side(copier), Step(NOWHERE, loads=loads)) == (bad, {1: 1, 2: 1, 3: 1}, failed)
    assert [slots for _, slots, _ in copier.calls] == [[1], [0], [2]]
    assert copier.awaited == [True, False, False]


def test_transfer_takes_its_share_of_the_copys_seconds() -> None:
    worker = side(RecordingCopier())
    worker.load(step())
    worker.store(step())
    worker.take_received()
    acks = worker.take_acks()
    assert acks is not None
    assert acks.seconds == pytest.approx({1: 2 / 3, 2: 1 / 3, 3: 1 / 3, 4: 2 / 3})


def test_stores_of_a_step_fail_together_and_report_no_block() -> None:
    assert play(side(RecordingCopier(1)), step()) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, {3, 4})


# Deferred stores, as with vLLM's first model runner on a device


def deferring_side(copier: RecordingCopier) -> WorkerSide:
    return side(copier, device=ReorderingDevice(Random(0)), defers_stores=True)


def test_deferred_stores_start_in_the_next_step_before_its_fence() -> None:
    copier = RecordingCopier()
    worker = deferring_side(copier)
    assert play(worker, step()) == (set(), {1: 1, 2: 1}, set())
    assert [name for name, *_ in copier.calls] == ["scatter"]
    following = Step(NOWHERE, number=1, fresh=[13])
    worker.fence(following)
    assert copier.calls[1:] == [("gather", [13, 14, 15], [3, 4, 5]), ("fence", [13], [])]
    assert play(worker, following) == (set(), {3: 1, 4: 1}, set())
    assert len(copier.calls) == 3


def test_deferred_stores_start_in_a_step_that_calls_no_fence() -> None:
    copier = RecordingCopier()
    worker = deferring_side(copier)
    play(worker, step())
    assert play(worker, Step(NOWHERE, number=1)) == (set(), {3: 1, 4: 1}, set())


def test_deferred_stores_that_fail_are_acknowledged_as_failed() -> None:
    worker = deferring_side(RecordingCopier(1))
    play(worker, step())
    assert play(worker, step(number=1)) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, {3, 4})


def test_stores_of_a_step_with_a_failed_load_are_not_deferred() -> None:
    copier = RecordingCopier(0)
    worker = deferring_side(copier)
    assert play(worker, step()) == ({10, 11, 12}, {1: 1, 2: 1, 3: 1, 4: 1}, {1, 2, 3, 4})
    play(worker, Step(NOWHERE, number=1))
    assert [name for name, *_ in copier.calls] == ["scatter"]


def test_stores_on_a_cpu_are_not_deferred() -> None:
    worker = side(RecordingCopier(), defers_stores=True)
    assert play(worker, step()) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, set())


@pytest.mark.parametrize("defers_stores", [False, True])
def test_stores_that_vllm_never_asks_for_start_before_the_next_fence(defers_stores: bool) -> None:
    """A pipeline stage without a drafter never asks, under vLLM's first model runner."""
    copier = RecordingCopier()
    worker = side(copier, device=ReorderingDevice(Random(0)), defers_stores=defers_stores)
    worker.load(step())
    following = Step(NOWHERE, number=1, fresh=[13])
    worker.fence(following)
    assert copier.calls[1:] == [("gather", [13, 14, 15], [3, 4, 5]), ("fence", [13], [])]
    assert play(worker, following) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, set())
    assert [name for name, *_ in copier.calls].count("gather") == 1


def test_worker_that_closes_drops_deferred_stores() -> None:
    copier = RecordingCopier()
    worker = deferring_side(copier)
    play(worker, step())
    worker.close()
    assert [name for name, *_ in copier.calls] == ["scatter"]


def test_step_after_a_failed_load_stores_again() -> None:
    worker = side(RecordingCopier(0))
    play(worker, step())
    assert play(worker, step(number=1)) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, set())


def test_worker_that_reports_a_failed_load_before_the_stores_fails_them() -> None:
    copier = RecordingCopier(0)
    worker = side(copier)
    worker.load(step(number=5))
    worker.take_received()
    assert worker.take_failed_blocks() == {10, 11, 12}
    assert worker.take_acks() == Acks({1: 1, 2: 1}, {1, 2}, 5, {1: ANY, 2: ANY})
    worker.store(step(number=5))  # as vLLM ends a step that drafts tokens
    assert worker.take_acks() == Acks({3: 1, 4: 1}, {3, 4})
    assert play(worker, step(number=6)) == (set(), {1: 1, 2: 1, 3: 1, 4: 1}, set())


def test_acks_have_the_seconds_of_started_copies_alone() -> None:
    worker = side(RecordingCopier(0))
    worker.load(step())
    worker.store(step())
    worker.take_received()
    acks = worker.take_acks()
    assert acks is not None
    assert set(acks.seconds) == {1, 2}  # no store was started, because a load had failed
    assert min(acks.seconds.values()) > 0


def test_ack_comes_in_the_step_that_reports_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Load:
        seconds = 1.0
        looks = iter([False, True])

        @property
        def done(self) -> bool:
            return next(self.looks)

    load = Load()
    monkeypatch.setattr(RecordingCopier, "_call", lambda *_: load)
    worker = side(RecordingCopier())
    worker.load(Step(NOWHERE, loads=[Transfer(1, [10], [0], awaited_by="waits")]))
    assert (worker.take_received(), worker.take_acks()) == (set(), None)
    assert worker.take_received() == {"waits"}
    assert worker.take_acks() == Acks({1: 1}, seconds={1: 1.0})


def test_fence_has_the_fresh_blocks_of_the_step() -> None:
    copier = RecordingCopier()
    side().fence(Step(NOWHERE, fresh=[7]))  # without a copier there is no copy to wait for
    side(copier).fence(Step(NOWHERE, fresh=[3, 4]))
    assert copier.calls == [("fence", [3, 4], [])]


def test_empty_step_reports_its_end() -> None:
    worker = side(RecordingCopier())
    assert play(worker, Step(NOWHERE)) == (set(), {}, set())
    worker.load(Step(NOWHERE, number=7))
    assert worker.take_acks() == Acks(step=7)


def registered() -> tuple[WorkerSide, dict[str, torch.Tensor]]:
    caches = {
        name: torch.randint(0, 100, (16, 2, 32, 8), dtype=torch.int16) for name in ("one", "two")
    }
    worker = side()
    worker.register(caches | {"alias": caches["one"]})
    return worker, caches


@pytest.mark.parametrize(
    "memory",
    [
        NOWHERE,
        one_piece(SlabDescriptor("/proc/self/fd/0", "kvcache-other", 8, 4096), 4096),
        one_piece(NOWHERE.slab, 4096, rank=(0, 1)),
    ],
    ids=["nothing there", "other memory", "not of this rank"],
)
def test_slab_that_cannot_be_attached_is_a_failed_copy(
    memory: SlabShards, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = registered()
    assert play(worker, step(memory)) == ({10, 11, 12}, {1: 1, 2: 1, 3: 1, 4: 1}, {1, 2, 3, 4})
    assert any("load of 3 blocks failed" in record.getMessage() for record in caplog.records)
    worker.close()


def test_pages_are_copied_to_the_shard_of_their_rank_and_back() -> None:
    worker, caches = registered()
    shard = worker.shard()
    assert shard is not None
    page = caches["one"][0].nbytes
    [nbytes] = shard.nbytes
    assert nbytes == 2 * page  # the alias is not counted
    slab = Slab.create(4, slot_nbytes_for(3 * nbytes))
    memory = one_piece(slab.descriptor, nbytes, offset=nbytes)  # the second of three ranks
    computed = {name: cache.clone() for name, cache in caches.items()}
    stored = Step(memory, stores=[Transfer(1, [5, 9], [3, 0])])
    assert play(worker, stored) == (set(), {1: 1}, set())
    for slot, block in [(3, 5), (0, 9)]:
        view = bytes(slab.view(slot))
        end = 2 * nbytes
        assert view[nbytes:end] == b"".join(
            tensor_bytes(computed[name][block]) for name in ("one", "two")
        )
        assert not any(view[:nbytes])
        assert not any(view[end:])
    for cache in caches.values():
        cache.zero_()
    loaded = Step(memory, loads=[Transfer(2, [2, 7], [0, 3])])
    assert play(worker, loaded) == (set(), {2: 1}, set())
    for name, cache in caches.items():
        assert torch.equal(cache[2], computed[name][9])
        assert torch.equal(cache[7], computed[name][5])
        others = [block for block in range(16) if block not in (2, 7)]
        assert not cache[others].any()
    worker.close()
    worker.close()  # twice is allowed
    slab.close()


def test_shard_before_register_is_none() -> None:
    assert side().shard() is None
