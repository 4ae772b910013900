"""The worker's side of the vLLM connector: copies whole pages between vLLM's KV cache and the slab.

Invariants:

1. A worker has no keys and no policy: a step names the block and the slot of every copy.
2. Loads come before the forward pass, stores after it. On a CPU they have ended when the step ends.
   On a GPU they run in parallel to the next steps: a job is acknowledged when its last page is
   copied, and vLLM waits until no copy reads a reused block before it writes to that block. If
   vLLM may write to new blocks before it calls `fence`, the next step waits for all stores.
   Stores may be deferred to the next step: they start before vLLM's first write of that step.
3. A failed copy raises no exception: its blocks are reported to vLLM, and its job as failed. With
   several of vLLM's groups a block id does not name a request, so the request is reported. If a
   load of a step failed, the step publishes no store, because its blocks may depend on blocks that
   were not loaded. That also holds if vLLM asks for the report before the step's stores begin.
   The transfers of one copy fail together.
4. Of ranks that have the same bytes, one stores them. The others acknowledge the store at once.
5. On a GPU a forward pass waits for a layer's pages when it asks for that layer (layer-wise load).
   It waits before it starts for the layers that it is not expected to ask for (`LayerSync`). If a
   pass skips a wait that was expected, its loaded blocks are reported as failed and its stores are
   not published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcache.connectors.transfer.base import CompletedCopy, Copy, PageCopier
from kvcache.connectors.transfer.factory import device_of, open_geometries
from kvcache.connectors.transfer.streams import Device
from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.groups import kept_groups, may_load_within_step
from kvcache.connectors.vllm.messages import Acks, Rank, Shard, SlabShards, Step, Transfer
from kvcache.connectors.vllm.worker.early_attach import EarlyAttach
from kvcache.connectors.vllm.worker.layer_sync import LayerSync
from kvcache.connectors.vllm.worker.pages import RankPages, host_format
from kvcache.connectors.vllm.worker.rank_pieces import Operation, RankPieces, TransferRows
from kvcache.connectors.vllm.worker.started_copies import StartedCopies, StartedCopy
from kvcache.process import bind_to_process

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)


class WorkerSide:
    """One per rank. Attaches the slab when it is announced, at the latest at the first copy.

    Args:
        kv_cache_config: the worker's.
        rank: this worker's.
        threads: that copy on a CPU.
        device: a device to use in place of the one that the KV cache is on.
        copier: a page copier to use in place of the one that fits the device.
        replicas: how many consecutive tensor ranks have the same bytes, for each of vLLM's groups;
            empty if no rank has the bytes of another one.
        defers_stores: whether the stores of a step start in the next step, if there is a device.
            vLLM's first model runner queues the copies of sampled tokens to the host after it calls
            `store`; they would wait for stores that start there.

    Attributes:
        device: that the engine computes on; ``None`` is the CPU.
        copier: ``None`` until the first copy.
    """

    def __init__(
        self,
        kv_cache_config: KVCacheConfig,
        rank: Rank,
        threads: int,
        *,
        device: Device | None = None,
        copier: PageCopier | None = None,
        replicas: tuple[int, ...] = (),
        defers_stores: bool = False,
    ) -> None:
        self._config = kv_cache_config
        self._rank = rank
        self._threads = threads
        self._replicas = replicas
        self._caches: dict[str, torch.Tensor] = {}
        self._pages: RankPages | None = None  # before `register`, and while vLLM sleeps
        self._pieces: RankPieces | None = None  # until the first copy
        self._shard: Shard | None = None
        self._early_attach: EarlyAttach | None = None
        self.device = device
        self.copier = copier
        self._layer_sync = LayerSync()
        # vLLM's second model runner zeroes new blocks, and copies states, before it calls `fence`.
        self._early_writes = getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
        self._defers_stores = defers_stores and not self._early_writes
        self._deferred: Step | None = None  # its stores have not started
        self._unsaved: Step | None = None  # vLLM has not called `store` for it
        self._started = StartedCopies()
        self._acks = Acks()
        self._failed_blocks: set[int] = set()  # not reported to vLLM yet
        self._failed_requests: set[str] = set()  # not reported to vLLM yet
        self._reports_requests = False  # in place of blocks
        self._failed_step = -1  # the last step of which a load failed
        self._received: set[str] = set()  # requests that no longer wait for an async load
        bind_to_process(self)

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Find the pages of every layer, and make this rank's shard of a block.

        Raises:
            RuntimeError: if a cache is no tensor or on an unknown device, or its first axis is not
                blocks.
        """
        self._caches = caches
        try:
            pages = self._pages = RankPages(self._config, caches)
            self.device = self.device or device_of(pages.placements[0])
            self._reports_requests = not may_load_within_step(kept_groups(self._config))
        except ValueError as error:
            raise RuntimeError(f"kvcache: {error}") from error
        if self._early_attach is None and self.copier is None:
            self._early_attach = EarlyAttach(self.device)
        early = self._early_attach
        device = pages.placements[0].device.partition(":")[0]
        self._shard = Shard(
            pages.nbytes,
            host_name(),
            f"{pages.format_id} {host_format() if self.device is None else device}",
            pages.element_nbytes,
            async_copies=self.device is not None,
            replicas=self._replicas,
            pipes=early.pipes if early is not None else None,
            nodes=early.nodes if early is not None else (),
        )
        if self.device is None:
            from kvcache.connectors.transfer.cpu import compile_in_background  # imports numba

            compile_in_background()

    def unregister(self) -> None:
        """Wait for all copies, and forget the pages: vLLM sleeps. Until `restore`, copies fail."""
        self._start_deferred()
        self._close_copier()
        self._pages = self._pieces = None

    def restore(self) -> None:
        """Find the pages again after `unregister`. Their addresses may have changed."""
        if self._pages is None and self._caches:
            self.register(self._caches)

    def shard(self) -> Shard | None:
        """Return this rank's part of a block; ``None`` before `register`."""
        return self._shard

    def fence(self, step: Step) -> None:
        """Have vLLM's writes of this step to its fresh blocks wait for copies that read them."""
        self._start_deferred()
        if self.copier is not None:
            self.copier.fence(step.fresh)

    def load(self, step: Step, mode: str | None = None) -> None:
        """Start the loads of ``step``. ``mode`` is that of its forward pass (`pass_mode`)."""
        self._start_deferred()
        self._layer_sync.set_mode(mode if self.device is not None else None)
        self._acks.step = step.number
        self._unsaved = step if step.stores else None
        # One copy for all loads of the pass, so that its first layers are there for all requests.
        together = [load for load in step.loads if load.awaited_by is None]
        for loads in (together, *([load] for load in step.loads if load.awaited_by is not None)):
            if not self._start(step.memory, loads, "load"):
                self._fail_loads(step, loads)

    def wait_for_layer(self, name: str) -> None:
        """Wait until a layer's pages are there. An unknown name may be an alias of any layer."""
        layer = self._pages.layers.get(name) if self._pages is not None else None
        if layer is not None:
            self._layer_sync.add_wait(layer)
        if self.copier is not None:
            self.copier.wait_for_layer(layer)

    def store(self, step: Step) -> None:
        """Wait for the loads of the step's forward pass, and start its stores, or defer them."""
        self._unsaved = None
        if self.copier is not None:
            self.copier.wait_for_layer()
        skipped = self._layer_sync.end_pass()
        loaded = [load for load in step.loads if load.awaited_by is None]
        if skipped and loaded:
            log.warning(
                "kvcache: worker: forward pass read %d layers without waiting for them; "
                "recomputing the blocks that it loaded",
                len(skipped),
            )
            self._fail_loads(step, loaded)
        if step.number == self._failed_step:
            for transfer in step.stores:
                self._ack(transfer, failed=True)
        elif self._defers_stores and self.device is not None:
            self._start_deferred()
            self._deferred = step
        else:
            self._start(step.memory, step.stores, "store")
        if self._early_writes and self.copier is not None and step.stores:
            self.copier.fence({block for transfer in step.stores for block in transfer.blocks})

    def _start_deferred(self) -> None:
        """Start the stores of the last step, if they were deferred or vLLM never asked for them.

        An engine that drafts asks for them after its drafter. With vLLM's first model runner, a
        pipeline stage without a drafter never asks.
        """
        if self._unsaved is not None:
            self.store(self._unsaved)
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            self._start(deferred.memory, deferred.stores, "store")

    def _fail_loads(self, step: Step, loads: Sequence[Transfer]) -> None:
        """Report the blocks of ``loads``, or their requests, and publish no store of ``step``."""
        self._failed_step = step.number
        if self._reports_requests:
            self._failed_requests.update(load.awaited_by for load in loads if load.awaited_by)
        else:
            self._failed_blocks.update(block for load in loads for block in load.blocks)

    def _start(
        self, memory: SlabShards, transfers: Sequence[Transfer], operation: Operation
    ) -> bool:
        """Start one copy for ``transfers``; return whether it could be started."""
        if not transfers:
            return True
        started_ns = time.time_ns()
        try:
            pieces = self._pieces or self._attach(memory)
            started_ns = time.time_ns()
            rows = pieces.rows(transfers, operation)
            copy = self._copy(rows, transfers, operation)
        except Exception as error:
            blocks = sum(len(transfer.blocks) for transfer in transfers)
            log.exception("kvcache: worker: %s of %d blocks failed", operation, blocks)
            ended = CompletedCopy((time.time_ns() - started_ns) / 1e9)
            nothing = [0] * len(transfers)
            failed = StartedCopy(operation, transfers, nothing, started_ns, ended)
            self._end(failed, error=type(error).__name__)
            return False
        self._started.add(StartedCopy(operation, transfers, rows.nbytes, started_ns, copy))
        return True

    def _copy(
        self, rows: TransferRows, transfers: Sequence[Transfer], operation: Operation
    ) -> Copy:
        """Start to copy ``rows``, which are those of ``transfers``."""
        if not rows.blocks:
            return CompletedCopy(0.0)
        assert self.copier is not None
        if operation == "store":
            return self.copier.gather(rows.blocks, rows.slots, rows.geometries)
        return self.copier.scatter(
            rows.slots,
            rows.blocks,
            rows.geometries,
            awaited=transfers[0].awaited_by is None,
            announced=self._layer_sync.expected,
        )

    def _end(self, started: StartedCopy, *, error: str | None) -> None:
        started.record_spans(self._rank, error)
        for transfer, seconds in zip(
            started.transfers, started.seconds_of_transfers(), strict=True
        ):
            self._acks.seconds[transfer.job] = seconds
            if transfer.awaited_by is not None:
                self._received.add(transfer.awaited_by)
            self._ack(transfer, failed=error is not None)

    def _attach(self, memory: SlabShards) -> RankPieces:
        """Attach the slab, and open the page copier unless there is one."""
        if self._pages is None:
            raise RuntimeError("vLLM has discarded the KV cache to sleep")
        pieces = RankPieces(memory, self._rank, self._pages)
        if self.copier is None:
            assert self._early_attach is not None
            geometries = pieces.geometries(self._early_attach.attach(memory.slab))
            self.copier = open_geometries(geometries, device=self.device, threads=self._threads)
        self._pieces = pieces
        return pieces

    def _ack(self, transfer: Transfer, *, failed: bool) -> None:
        self._acks.ranks[transfer.job] = 1
        if failed:
            self._acks.failed.add(transfer.job)

    def take_failed_blocks(self) -> set[int]:
        """Return the engine's blocks that loads did not write, since the last call.

        Empty where failed loads are reported by `take_failed_requests`.
        """
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Return the requests with an async load that failed, since the last call.

        Empty where failed loads are reported by `take_failed_blocks`. `take_received` returns these
        requests, too.
        """
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_received(self) -> set[str]:
        """End the copies that are over, and return the requests that no longer wait for a load.

        A load that failed has ended, too.
        """
        for started in self._started.take_ended():
            self._end(started, error=None)
        received, self._received = self._received, set()
        return received

    def take_acks(self) -> Acks | None:
        """Return the acks of the jobs that `take_received` ended, since the last call.

        No later ones: vLLM may stop stepping once it knows of the last job, and it has to know of
        the request that waits for that job first.
        """
        acks, self._acks = self._acks, Acks()
        return acks if acks.ranks or acks.step else None

    def _close_copier(self) -> None:
        """Wait for all copies, and use the copier no more."""
        if self.copier is not None:
            self.copier.close()
            self.copier = None

    def close(self) -> None:
        """Drop deferred stores, close the copier, and detach the slab. Closing twice is allowed."""
        self._deferred = self._unsaved = None
        self._close_copier()
        self._caches = {}
        if self._early_attach is not None:
            self._early_attach.close()
            self._early_attach = None
