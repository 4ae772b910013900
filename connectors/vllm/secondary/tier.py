"""``KVCacheTier``: the lower tiers of a profile as one of vLLM's secondary tiers.

Invariants:

* vLLM's scheduler never waits for a tier: lookups, loads and stores run in threads. The exceptions
  are `drain_jobs` and `shutdown`, which end the jobs; each call of a job has the tier's deadline.
* A job ends at its deadline, so a hanging tier does not pin vLLM's memory. Its blocks are then
  misses, or not stored, and a late call of a tier cannot read or write their rows.
* A loaded block equals the stored one: the tiers verify it in its frame, which has its key.
* Keys of vLLM have a hash of the tokens and the number of a KV cache group. The names in the tiers
  are digests of the whole key, under a namespace with the engine's identity.
* After vLLM has reset its cache, no earlier block is found.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Final

from opentelemetry.trace import Span
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingMetricMetadata,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvcache import telemetry
from kvcache.connectors.vllm.compat import log_as_vllm_does
from kvcache.connectors.vllm.metrics import Reports
from kvcache.connectors.vllm.secondary.compute_times import ComputeTimes
from kvcache.connectors.vllm.secondary.events import AnnouncedBlocks
from kvcache.connectors.vllm.secondary.lookups import TierLookups
from kvcache.connectors.vllm.secondary.metrics import metric_definitions, offloading_stats
from kvcache.connectors.vllm.secondary.opening import open_rows_tiers
from kvcache.connectors.vllm.secondary.options import read_options
from kvcache.connectors.vllm.secondary.request_spans import OffloadedRequestSpans
from kvcache.connectors.vllm.secondary.transfers import Move, RowTransfer, TransferQueue
from kvcache.keys import DIGEST_NBYTES
from kvcache.process import bind_to_process

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import (
        OffloadingSpec,
        OffloadKey,
        ReqContext,
        ScheduleEndContext,
    )
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
    from vllm.v1.kv_offload.tiering.base import TransferJob

log = logging.getLogger(__name__)

LOAD_THREADS: Final = 2
STORE_THREADS: Final = 2
"""Jobs that are in transfer at the same time. The tiers divide each of them among their threads."""

PIECE_NBYTES: Final = 256 << 20
"""The most bytes of a job that are handed to the tiers at once."""

FLUSH_S: Final = 5.0
"""How long `shutdown` lets stores continue; as long as a stack does."""

CLOSE_S: Final = 2.0
"""For closing the tiers, and for threads to end, at `shutdown`."""

Place = tuple[int, int]
"""Where a block is in its prompt: the end of its last token, and the number of its group."""


class KVCacheTier(SecondaryTierManager):
    """The lower tiers of a profile below vLLM's own host memory.

    Args:
        offloading_spec: vLLM's description of the engine's rows.
        primary_kv_view: vLLM's host memory, of shape (rows, bytes of a row). A row is a chunk: one
            or more blocks of one KV cache group, of all ranks.
        tier_type: the ``type`` in vLLM's configuration.
        backpressure_detector: vLLM's own; it decides which stores reach this tier.
        options: as `SecondaryOptions` has them.

    Raises:
        ValueError: if an option or the profile is wrong, or a tier cannot be opened.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **options: Any,
    ) -> None:
        log_as_vllm_does()
        given = read_options(tier_type, options)
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = None if given.locality is None else Locality(given.locality)
        self._clock = time.monotonic
        assert primary_kv_view.shape is not None  # it has one unless it was released
        self._row_count, self._row_nbytes = primary_kv_view.shape
        self._piece_blocks = max(1, PIECE_NBYTES // self._row_nbytes)
        self._spans = OffloadedRequestSpans(offloading_spec.config.model.name)
        self._events = self._announcements(given.enable_kv_events)
        self._last_stored: dict[str, tuple[Place, bytes]] = {}  # by request: place and name
        self._ended: list[JobResult] = []  # before a reset, and not reported
        self._closed = False
        with ExitStack() as opened:
            self._memory = opened.enter_context(primary_kv_view.cast("B"))
            self._tiers = open_rows_tiers(offloading_spec, given, tier_type, self._row_nbytes)
            opened.callback(self._tiers.close, CLOSE_S)
            self._compute_times = ComputeTimes(self._tiers.observe_compute, self._clock)
            self._lookups = TierLookups(self._contains, self._tiers.deadline_s, self._clock)
            opened.callback(self._lookups.close, 0.0)
            shortest_s = min(tier.channel.deadline_s for tier in self._tiers.tiers)
            queue = partial(self._queue, shortest_s)
            self._loads = queue("vllm-load", LOAD_THREADS, self._load, self._row_count)
            opened.callback(self._loads.close, 0.0)
            # A quarter, as for the write queue of a stack: stores must not pin all of the memory.
            most_stored = max(1, self._row_count // 4)
            self._stores = queue("vllm-store", STORE_THREADS, self._store, most_stored)
            opened.callback(self._stores.close, 0.0)
            if [tier.kind for tier in self._tiers.names] != ["disk"]:
                # vLLM's metric of hits knows disks, and no word for servers.
                self.cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED
            self._reports = Reports(self._tiers, self._clock)
            opened.pop_all()
        bind_to_process(self)

    def _queue(
        self, deadline_s: float, name: str, threads: int, move: Move, most_blocks: int
    ) -> TransferQueue:
        return TransferQueue(
            name,
            threads=threads,
            move=move,
            view=self._row,
            piece_blocks=self._piece_blocks,
            most_blocks=most_blocks,
            deadline_s=deadline_s,
            clock=self._clock,
        )

    def _announcements(self, enable_kv_events: bool) -> AnnouncedBlocks | None:
        if not enable_kv_events:
            return None
        if not self._offloading_spec.kv_events_config.enable_kv_cache_events:
            log.warning(
                "kvcache: secondary tier: enable_kv_events is set, and vLLM publishes no KV events "
                "(--kv-events-config); the tier emits none"
            )
            return None
        return AnnouncedBlocks(self.medium, self.locality)

    # Requests

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._spans.start(req_context)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        request_id = req_context.req_id
        self._lookups.forget(request_id)
        self._compute_times.forget(request_id)
        self._last_stored.pop(request_id, None)
        self._spans.finish(request_id)

    def open_requests(self) -> int:
        """Return how many requests have an entry in one of the tables; 0 when all have ended."""
        tables = (self._spans, self._lookups, self._compute_times, self._last_stored)
        return max(len(table) for table in tables)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()
        self._compute_times.scheduled(context.new_req_ids)

    # Lookups

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        held = self._lookups.ask(key, req_context.req_id)
        if held is None:
            return LookupResult.RETRY
        return LookupResult.HIT if held else LookupResult.MISS

    def _contains(self, keys: Sequence[bytes], request_id: str) -> Sequence[bool]:
        span = self._spans.start_operation(request_id, telemetry.LOOKUP)
        held: Sequence[bool] = ()
        try:
            held = self._tiers.contains([_name(key) for key in keys], parent_span=span)
            return held
        finally:
            telemetry.end_span(
                span, {telemetry.REQUESTED: len(keys), telemetry.HIT: sum(map(bool, held))}
            )

    # Loads and stores

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys = list(job_metadata.keys)
        self._loads.submit(
            RowTransfer(
                job_metadata.job_id,
                keys,
                [_name(key) for key in keys],
                [int(row) for row in job_metadata.chunk_ids],
                span=self._start_span(job_metadata, telemetry.LOAD),
            )
        )

    def submit_store(self, job_metadata: TransferJob) -> None:
        request = job_metadata.req_context
        pairs = list(zip(job_metadata.keys, map(int, job_metadata.chunk_ids), strict=True))
        # vLLM may pass a set. A tier that is full evicts the end of a chain first, so it has to
        # learn the order: by position in the prompt, whatever the group.
        places = {key: _place(request.get_offload_key_position(key), key) for key, _ in pairs}
        pairs.sort(key=lambda pair: places[pair[0]])
        keys = [key for key, _ in pairs]
        names = [_name(key) for key in keys]
        parent = None
        if keys:
            parent = self._parent(request, places[keys[0]])
            self._last_stored[request.req_id] = (places[keys[-1]], names[-1])
            self._compute_times.stored(request.req_id, len(keys))
        self._stores.submit(
            RowTransfer(
                job_metadata.job_id,
                keys,
                names,
                [row for _, row in pairs],
                parent,
                span=self._start_span(job_metadata, telemetry.STORE),
            )
        )

    def _parent(self, request: ReqContext, place: Place) -> bytes | None:
        """Return the name of the block before the one at ``place``; ``None`` if unknown."""
        if request.req_id in self._last_stored:
            last_place, name = self._last_stored[request.req_id]
            return name if last_place < place else None
        # The first blocks that this request stores continue those that vLLM had already.
        positions: Mapping[Any, int] = getattr(request, "_offload_key_positions", {})
        before = [(_place(position, key), key) for key, position in positions.items()]
        _, key = max((each for each in before if each[0] < place), default=(place, None))
        return None if key is None else _name(key)

    def _start_span(self, job: TransferJob, name: str) -> Span:
        return self._spans.start_operation(job.req_context.req_id, name)

    def _load(
        self, transfer: RowTransfer, begin: int, end: int, rows: Sequence[memoryview]
    ) -> Sequence[bool]:
        return self._tiers.load(transfer.names[begin:end], rows, parent_span=transfer.span)

    def _store(
        self, transfer: RowTransfer, begin: int, end: int, rows: Sequence[memoryview]
    ) -> Sequence[bool]:
        parent = transfer.names[begin - 1] if begin else transfer.parent
        names = transfer.names[begin:end]
        return self._tiers.store(names, rows, parent, cause=transfer.span)

    def _row(self, row: int) -> memoryview:
        return self._memory[row * self._row_nbytes : (row + 1) * self._row_nbytes]

    def get_finished_jobs(self) -> Iterable[JobResult]:
        ended, self._ended = self._ended, []
        return ended + self._take_finished()

    def _take_finished(self) -> list[JobResult]:
        results = []
        for transfer in self._loads.take_finished():
            good, failed = transfer.split()
            # Otherwise vLLM would find the same blocks, and load them, again and again.
            self._lookups.mark(failed, held=False)
            if self._events is not None:
                self._events.gone(failed)
            self._end_span(transfer, telemetry.HIT, good)
            results.append(self._result(transfer, good))
        for transfer in self._stores.take_finished():
            good, _ = transfer.split()
            self._lookups.mark(good, held=True)
            if self._events is not None:
                self._events.stored(good)
            self._end_span(transfer, telemetry.STORED, good)
            results.append(self._result(transfer, good))
        return results

    def _result(self, transfer: RowTransfer, good: Collection[Any]) -> JobResult:
        return JobResult(
            job_id=transfer.job_id,
            success=len(good) == len(transfer.keys),
            successful_keys=tuple(good),
            transfer_time=transfer.seconds,
            transfer_bytes=len(good) * self._row_nbytes,
        )

    def _end_span(self, transfer: RowTransfer, outcome: str, good: Collection[Any]) -> None:
        failed = len(transfer.keys) - len(good)
        telemetry.end_span(
            transfer.span,
            {
                telemetry.REQUESTED: len(transfer.keys),
                outcome: len(good),
                telemetry.PAYLOAD: len(good) * self._row_nbytes,
                **({telemetry.FAILED: failed} if failed else {}),
            },
        )

    def has_pending_work(self) -> bool:
        return bool(self._ended) or self._loads.pending or self._stores.pending

    # Events, metrics, the end

    def take_events(self) -> Iterable[OffloadingEvent]:
        return () if self._events is None else self._events.take()

    @classmethod
    def build_metric_definitions(
        cls,
        extra_config: dict[str, Any],  # noqa: ARG003
    ) -> dict[str, OffloadingMetricMetadata]:
        return metric_definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        report = self._reports.take(now=False)
        return None if report is None or report.is_empty() else offloading_stats(report)

    def drain_jobs(self) -> None:
        """End all jobs and forget all blocks: vLLM calls this only to reset its cache.

        Blocks that were computed before the reset may belong to weights that vLLM has replaced.
        """
        for queue in (self._loads, self._stores):
            queue.drop_waiting()
        # The tiers would keep what a running job stores after the reset, so it has to end before.
        self._wait(self._longest_piece_s())
        self._ended += self._take_finished()
        self._tiers.clear()
        self._lookups.mark_all_missed()
        if self._events is not None:
            self._events.cleared()

    def _longest_piece_s(self) -> float:
        """Return how long a piece of a job takes at most, if each of its calls takes a deadline."""
        return sum(
            tier.channel.deadline_s * -(-self._piece_blocks // tier.channel.blocks_per_call)
            for tier in self._tiers.tiers
        )

    def _wait(self, timeout_s: float) -> None:
        for queue in (self._loads, self._stores):
            if not queue.wait(timeout_s + CLOSE_S):
                raise RuntimeError(
                    "kvcache: a tier did not return at its deadline, and may still use vLLM's "
                    "memory; report it"
                )

    def shutdown(self) -> None:
        """Let stores continue for `FLUSH_S`, then close the tiers. Calling it twice is allowed.

        Raises:
            RuntimeError: if a call still uses vLLM's memory; vLLM then keeps it mapped.
        """
        if self._closed:
            return
        self._closed = True
        self._stores.wait(FLUSH_S)
        self._tiers.close(CLOSE_S)  # jobs end with the calls that they have started
        try:
            self._wait(self._tiers.deadline_s)
        finally:
            for pool in (self._lookups, self._loads, self._stores):
                pool.close(CLOSE_S)
            self._spans.close()
        self._memory.release()


def _place(position: int | None, key: Any) -> Place:
    return position or 0, get_offload_group_idx(key)


def _name(key: bytes) -> bytes:
    """Return the name of a block in the tiers: vLLM's keys have more bytes than some tiers take."""
    return blake2b(key, digest_size=DIGEST_NBYTES, person=b"kvcache.row").digest()
