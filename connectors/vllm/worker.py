"""The worker's half of the vLLM connector: whole pages between the engine's cache and the slab.

1. No keys, no policy: a step says which block goes with which slot.
2. Loads come before the forward pass, stores after it. On a CPU both have ended when the step ends.
   On a GPU they go on beside what the engine does next: a job is acknowledged when its last page is
   there, and a block that the engine hands out anew is written when no copy reads it any more.
3. A copy that fails is an answer, not a crash: its blocks are reported to vLLM, its job as failed.
   What this step computed may rest on blocks that were not loaded: it publishes no store.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.connectors.copier import Copy, PageCopier, Pages
from kvcache.connectors.device import Device, DeviceCopier
from kvcache.connectors.pages import CpuCopier, prepare
from kvcache.connectors.pins import Pins
from kvcache.connectors.vllm.messages import Acks, Memory, Rank, Shard, Step, Transfer
from kvcache.connectors.vllm.support import host_name
from kvcache.slab import Slab

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A copy that was begun, and whose it is."""

    transfer: Transfer
    load: bool
    span: Span
    copy: Copy


class WorkerSide:
    """One per rank; attaches the slab at the first step, when it is told where it is."""

    def __init__(self, kv_cache_config: KVCacheConfig, rank: Rank, threads: int) -> None:
        self._config = kv_cache_config
        self._rank = rank
        self._threads = threads
        self._pages: list[Pages] = []
        self._form = ""
        self._element_nbytes = 0
        self._slab: Slab | None = None
        self.device: Device | None = None  # that the engine computes on; None: this processor
        self._pins: Pins | None = None
        self.copier: PageCopier | None = None
        self._under_way: list[_UnderWay] = []
        self._acks = Acks()
        self._bad_blocks: set[int] = set()
        self._received: set[str] = set()  # requests whose loads are over

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Learn where the pages of every layer lie.

        Raises:
            RuntimeError: for a cache on another device, or whose pages are not contiguous.
        """
        group = self._config.kv_cache_groups[0]
        self._pages = [
            layer_pages(name, caches[name], self._config.num_blocks) for name in group.layer_names
        ]
        first = caches[group.layer_names[0]]
        self._form, self._element_nbytes = form_of(first), first.element_size()
        if first.device.type == "cuda":
            from kvcache.connectors.cuda import Cuda

            self.device = Cuda(first.device)
        else:
            prepare()

    def shard(self) -> Shard | None:
        """What this rank keeps of a block; ``None`` when nothing was registered."""
        if not self._pages:
            return None
        nbytes = sum(pages.nbytes for pages in self._pages)
        beside = self.device is not None
        return Shard(nbytes, host_name(), self._form, self._element_nbytes, beside)

    def prepare(self, step: Step) -> None:
        """Before anything is done for ``step``: the engine may write the blocks it hands out."""
        if self.copier is not None:
            self.copier.fence(step.fresh)

    def load(self, step: Step) -> None:
        self._acks.step = step.number
        for transfer in step.loads:
            if not self._begin(step.memory, transfer, load=True):
                self._bad_blocks.update(transfer.blocks)

    def store(self, step: Step) -> None:
        doubtful = bool(self._bad_blocks)
        for transfer in step.stores:
            if doubtful:
                self._ack(transfer, failed=True)
            else:
                self._begin(step.memory, transfer, load=False)

    def _begin(self, memory: Memory, transfer: Transfer, *, load: bool) -> bool:
        span, begun = telemetry.beyond(transfer.trace, telemetry.COPY), time.perf_counter()
        try:
            copier = self.copier or self._attach(memory)
            if load:
                awaited = transfer.awaited_by is None
                copy = copier.scatter(transfer.slots, transfer.blocks, awaited=awaited)
            else:
                copy = copier.gather(transfer.blocks, transfer.slots)
        except Exception as wrong:
            what = "load" if load else "store"
            log.exception("kvcache: %s of %d blocks failed", what, len(transfer.blocks))
            seconds = time.perf_counter() - begun
            self._end(transfer, span, seconds, load=load, error=type(wrong).__name__)
            return False
        self._under_way.append(_UnderWay(transfer, load, span, copy))
        return True

    def _end(
        self, transfer: Transfer, span: Span, seconds: float, *, load: bool, error: str | None
    ) -> None:
        self._acks.seconds[transfer.job] = seconds
        if transfer.awaited_by is not None:
            self._received.add(transfer.awaited_by)
        blocks = len(transfer.blocks)
        telemetry.end(
            span,
            {
                telemetry.DIRECTION: "load" if load else "store",
                telemetry.RANK: "pp{} tp{}".format(*self._rank),
                telemetry.REQUESTED: blocks,
                telemetry.PAYLOAD: blocks * sum(pages.nbytes for pages in self._pages),
            },
            error=error,
        )
        self._ack(transfer, failed=error is not None)

    def _attach(self, memory: Memory) -> PageCopier:
        slab = self._slab = self._slab or Slab.attach(memory.slab)
        where = {
            "slab_address": slab.address,
            "slots": slab.slots,
            "slot_nbytes": slab.slot_nbytes,
            "offset": memory.offsets[self._rank],
        }
        if self.device is None:
            self.copier = CpuCopier(self._pages, **where, threads=self._threads)
            slab.populate()
        else:
            self.copier = DeviceCopier(self._pages, **where, device=self.device)
            self._pins = Pins(slab, self.device)
            slab.populate(self._pins.ready)
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
        """Requests that waited for a load that is over, well or not."""
        self._look()
        received, self._received = self._received, set()
        return received

    def take_acks(self) -> Acks | None:
        """The jobs that have ended since this was asked last."""
        self._look()
        acks, self._acks = self._acks, Acks()
        return acks if acks.ranks or acks.step else None

    def _look(self) -> None:
        """End the copies that are over."""
        going = []
        for job in self._under_way:
            if job.copy.over:
                self._end(job.transfer, job.span, job.copy.seconds, load=job.load, error=None)
            else:
                going.append(job)
        self._under_way = going

    def close(self) -> None:
        if self.copier is not None:
            self.copier.close()
            self.copier = None
        if self._pins is not None:
            self._pins.close()
            self._pins = None
        if self._slab is not None:
            self._slab.close()
            self._slab = None


def form_of(cache: torch.Tensor) -> str:
    """What sets the bytes of a page apart, beyond their number.

    On a CPU the same model has other bytes on another instruction set: attention packs its keys and
    values for the one it runs on.
    """
    import torch

    page = f"{tuple(cache.shape[1:])} {cache.stride()[1:]} {cache.dtype}"
    if cache.device.type != "cpu":
        return f"{page} {cache.device.type}"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return f"{page} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={amx}"


def layer_pages(name: str, cache: torch.Tensor, blocks: int) -> Pages:
    """Where the pages of one layer lie.

    Args:
        name: the layer, for messages.
        cache: ``[blocks * n, ...]``, n kernel blocks to a block; the view that vLLM registers.
        blocks: blocks of the engine's cache.

    Raises:
        RuntimeError: when this cannot be copied page by page here.
    """
    import torch

    if cache.device.type != "cpu" and (cache.device.type != "cuda" or torch.version.hip):
        raise RuntimeError(
            f"kvcache: the KV cache of layer {name} is on {cache.device}; this version copies "
            "from and to a CPU and CUDA devices"
        )
    if cache.shape[0] % blocks or not cache[0].is_contiguous():
        raise RuntimeError(
            f"kvcache: the KV cache of layer {name}, shape {tuple(cache.shape)}, strides "
            f"{cache.stride()}, is not {blocks} blocks of contiguous pages; use a layout in which "
            "a block of a layer is one run of bytes, such as VLLM_KV_CACHE_LAYOUT=LBHNC"
        )
    kernel_blocks = cache.shape[0] // blocks
    stride = cache.stride(0) * cache.element_size()
    nbytes = cache[0].nbytes
    if kernel_blocks > 1 and stride != nbytes:
        raise RuntimeError(
            f"kvcache: the KV cache of layer {name} splits a block into {kernel_blocks} pieces "
            f"that lie {stride} bytes apart and have {nbytes}; they must follow each other"
        )
    return Pages(
        address=cache.data_ptr(),
        nbytes=nbytes * kernel_blocks,
        stride=stride * kernel_blocks,
        count=blocks,
    )
