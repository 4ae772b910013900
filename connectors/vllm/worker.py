"""The worker's half of the vLLM connector: whole pages between the engine's cache and the slab.

1. No keys, no policy: a step says which block goes with which slot.
2. Loads come before the forward pass, stores after it. On a CPU both have ended when the step ends.
   On a GPU they go on beside what the engine does next: a job is acknowledged when its last page is
   there, and a block that the engine hands out anew is written when no copy reads it any more.
3. A copy that fails is an answer, not a crash: its blocks are reported to vLLM, its job as failed.
   What a step computed may rest on blocks that it did not load: it publishes no store, also where
   vLLM takes the report of the step before it has the step's stores begun.
4. On a GPU a forward pass waits for a layer's pages when it asks for that layer, if it is trusted
   to (`passes`); the others' are there before. One that did not ask what it was trusted to is not
   believed: the blocks that it loaded are reported, and it publishes no store.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcache import telemetry
from kvcache.connectors.layout.axes import LayoutError
from kvcache.connectors.layout.placement import Placement, place
from kvcache.connectors.transfer.base import CompletedCopy, Copy, PageCopier
from kvcache.connectors.transfer.cpu import compile_kernels
from kvcache.connectors.transfer.factory import device_of, format_id, open_copier
from kvcache.connectors.transfer.streams import Device
from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.layer_sync import LayerSync
from kvcache.connectors.vllm.messages import Acks, Rank, Shard, SlabShards, Step, Transfer
from kvcache.process import bind_to_process
from kvcache.slab import Slab

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A transfer, and the copy that was begun for it and maybe others."""

    transfer: Transfer
    load: bool
    begun_ns: int  # since 1970
    copy: Copy
    share: float  # of the copy

    @property
    def seconds(self) -> float:
        return self.copy.seconds * self.share


class WorkerSide:
    """One per rank; attaches the slab at the first step, when it is told where it is."""

    def __init__(self, kv_cache_config: KVCacheConfig, rank: Rank, threads: int) -> None:
        self._config = kv_cache_config
        self._rank = rank
        self._threads = threads
        self._placement: Placement | None = None
        self._shard: Shard | None = None
        self._slab: Slab | None = None
        self.device: Device | None = None  # that the engine computes on; None: this processor
        self.copier: PageCopier | None = None
        self._layers: dict[str, int] = {}
        self._passes = LayerSync()
        self._under_way: list[_UnderWay] = []
        self._acks = Acks()
        self._bad_blocks: set[int] = set()  # not reported yet
        self._doubtful = -1  # the last step of which a load failed
        self._received: set[str] = set()  # requests whose loads are over
        bind_to_process(self)

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Learn where the pages of every layer lie.

        Raises:
            RuntimeError: for a cache on a device that is not known, or not cut into blocks.
        """
        names = self._config.kv_cache_groups[0].layer_names
        try:
            ours = {name: caches[name] for name in names}  # there may be aliases among the others
            placement = self._placement = place_caches(ours, self._config.num_blocks)
            self.device = device_of(placement)
        except ValueError as error:
            raise RuntimeError(f"kvcache: {error}") from error
        self._layers = {name: number for number, name in enumerate(names)}
        where = host_form() if self.device is None else placement.device.partition(":")[0]
        self._shard = Shard(
            placement.block_nbytes,
            host_name(),
            f"{format_id(placement)} {where}",
            placement.element_nbytes,
            async_copies=self.device is not None,
        )
        if self.device is None:
            compile_kernels()

    def shard(self) -> Shard | None:
        """What this rank keeps of a block; ``None`` when nothing was registered."""
        return self._shard

    def fence(self, step: Step) -> None:
        """Before anything is done for ``step``: the engine may write the blocks it hands out."""
        if self.copier is not None:
            self.copier.fence(step.fresh)

    def load(self, step: Step, kind: str | None = None) -> None:
        """Begin the loads of ``step``, whose forward pass is of this ``kind`` (``kind_of``)."""
        self._passes.is_of(kind if self.device is not None else None)
        self._acks.step = step.number
        # What the pass awaits is one copy, so that its first layers are there for all requests.
        awaited = [load for load in step.loads if load.awaited_by is None]
        for loads in (awaited, *([load] for load in step.loads if load.awaited_by is not None)):
            if not self._begin(step.memory, loads, load=True):
                self._not_loaded(step, loads)

    def wait_for_layer(self, name: str) -> None:
        """The forward pass asks for a layer. One that is not ours may have the cache of any."""
        layer = self._layers.get(name)
        if layer is not None:
            self._passes.asks(layer)
        if self.copier is not None:
            self.copier.wait_for_layer(layer)

    def store(self, step: Step) -> None:
        if self.copier is not None:
            self.copier.wait_for_layer()
        unasked = self._passes.ends()
        loaded = [load for load in step.loads if load.awaited_by is None]
        if unasked and loaded:
            log.warning(
                "kvcache: a forward pass read %d layers that it had not asked for, "
                "maybe before they were loaded: it is made again",
                len(unasked),
            )
            self._not_loaded(step, loaded)
        for transfer in step.stores:
            if step.number == self._doubtful:
                self._ack(transfer, failed=True)
            else:
                self._begin(step.memory, [transfer], load=False)

    def _not_loaded(self, step: Step, loads: Sequence[Transfer]) -> None:
        """What ``step`` computes may depend on blocks that these did not write."""
        self._doubtful = step.number
        self._bad_blocks.update(block for load in loads for block in load.blocks)

    def _begin(self, memory: SlabShards, transfers: Sequence[Transfer], *, load: bool) -> bool:
        """Begin one copy for all of them, which are loads together or not at all."""
        blocks = [block for transfer in transfers for block in transfer.blocks]
        slots = [slot for transfer in transfers for slot in transfer.slots]
        if not blocks:
            return True
        begun_ns = time.time_ns()
        try:
            copier = self.copier or self._attach(memory)
            begun_ns = time.time_ns()
            if load:
                awaited = transfers[0].awaited_by is None
                trusted = self._passes.trusted
                copy = copier.scatter(slots, blocks, awaited=awaited, announced=trusted)
            else:
                copy = copier.gather(blocks, slots)
        except Exception as wrong:
            what = "load" if load else "store"
            log.exception("kvcache: %s of %d blocks failed", what, len(blocks))
            over = CompletedCopy((time.time_ns() - begun_ns) / 1e9)
            for transfer in transfers:
                failed = _UnderWay(transfer, load, begun_ns, over, 1.0)
                self._end(failed, error=type(wrong).__name__)
            return False
        for transfer in transfers:
            share = len(transfer.blocks) / len(blocks)
            self._under_way.append(_UnderWay(transfer, load, begun_ns, copy, share))
        return True

    def _end(self, ended: _UnderWay, *, error: str | None) -> None:
        transfer = ended.transfer
        self._acks.seconds[transfer.job] = ended.seconds
        if transfer.awaited_by is not None:
            self._received.add(transfer.awaited_by)
        blocks = len(transfer.blocks)
        telemetry.end_span(
            telemetry.start_remote_child(transfer.trace, telemetry.COPY, ended.begun_ns),
            {
                telemetry.DIRECTION: "load" if ended.load else "store",
                telemetry.RANK: "pp{} tp{}".format(*self._rank),
                telemetry.REQUESTED: blocks,
                telemetry.PAYLOAD: blocks * (self._shard.nbytes if self._shard else 0),
            },
            error=error,
            ended_ns=ended.begun_ns + round(ended.copy.seconds * 1e9),
        )
        self._ack(transfer, failed=error is not None)

    def _attach(self, memory: SlabShards) -> PageCopier:
        slab = self._slab = self._slab or Slab.attach(memory.slab)
        assert self._placement is not None
        self.copier = open_copier(
            self._placement,
            slab,
            device=self.device,
            offset=memory.offsets[self._rank],
            threads=self._threads,
        )
        slab.populate(self.copier.pin_slots)
        return self.copier

    def _ack(self, transfer: Transfer, *, failed: bool) -> None:
        self._acks.ranks[transfer.job] = 1
        if failed:
            self._acks.failed.add(transfer.job)

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the engine that were promised and could not be loaded this step."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_received(self) -> set[str]:
        """Requests that waited for a load that is over, well or not. Looks at all copies."""
        self._look()
        received, self._received = self._received, set()
        return received

    def take_acks(self) -> Acks | None:
        """The jobs that had ended when `take_received` looked, since this was asked last.

        No later ones: the engine may make no step after it has heard of the last job, and it must
        have heard of the request that waited for it.
        """
        acks, self._acks = self._acks, Acks()
        return acks if acks.ranks or acks.step else None

    def _look(self) -> None:
        """End the copies that are over."""
        going = []
        for job in self._under_way:
            if job.copy.done:
                self._end(job, error=None)
            else:
                going.append(job)
        self._under_way = going

    def close(self) -> None:
        if self.copier is not None:
            self.copier.close()
            self.copier = None
        if self._slab is not None:
            self._slab.close()
            self._slab = None


def host_form() -> str:
    """What sets the bytes of a page apart on a CPU, beyond what its tensor shows.

    The same model has other bytes on another instruction set: attention packs its keys and values
    for the one it runs on.
    """
    import torch

    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={amx}"


def place_caches(caches: dict[str, torch.Tensor], blocks: int) -> Placement:
    """Where the blocks of these layers lie.

    Args:
        caches: by name, the views that vLLM registers: ``[blocks * n, ...]``, n kernel blocks to
            a block. What the other axes mean is their attention's matter, so pages are opaque.
        blocks: of the engine's cache.

    Raises:
        LayoutError: when a cache is not so many blocks, or cannot be copied run by run.
    """
    for name, cache in caches.items():
        if not cache.shape[0] or cache.shape[0] % blocks:
            raise LayoutError(
                f"the KV cache of layer {name}, shape {tuple(cache.shape)}, strides "
                f"{cache.stride()}, is not {blocks} blocks"
            )
    views = {name: cache.unflatten(0, (blocks, -1)) for name, cache in caches.items()}
    return place(views, "opaque")
