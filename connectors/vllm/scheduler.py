"""The scheduler's side of the vLLM connector: keys, leases and jobs; no tensors and no bytes.

Invariants:

1. The connector reports to vLLM only blocks that are pinned in L1. Their lease is a
   *pending load* until vLLM admits the request (then it is the lease of a job), asks for another
   start, or finishes the request.
2. A hit that is loaded within the step leaves at least one token to compute. An async load may
   cover the whole prompt: vLLM then recomputes its last token.
3. Every complete block of an admitted request is offered to the stack once its KV is computed:
   blocks of prompt and answer, and those that vLLM found in its own prefix cache.
4. No block that depends on a failed load is published, even if vLLM reports the failure late
   (`connectors/jobs.py`, `connectors/suspects.py`).
5. A load that would delay the step of other requests is async: vLLM schedules its request when the
   load has ended. Copies that are made within the step are never async.
6. After `reset`, no block that was computed before it is found or published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from kvcache import telemetry
from kvcache.connectors.jobs import AdmittedRequest, Jobs
from kvcache.connectors.step_timer import StepTimer
from kvcache.connectors.suspects import SuspectBlocks
from kvcache.connectors.vllm.adapters import Adapters
from kvcache.connectors.vllm.compat import recomputes_failed_loads
from kvcache.connectors.vllm.events import EventSource, events_of
from kvcache.connectors.vllm.groups import NO_GROUP, kept_group, kept_groups
from kvcache.connectors.vllm.handshake import open_sharded_stack
from kvcache.connectors.vllm.hints import HintReader
from kvcache.connectors.vllm.messages import Acks, Rank, Refusal, Shard, SlabShards, Step, Transfer
from kvcache.connectors.vllm.metrics import Reports, Stats
from kvcache.connectors.vllm.pending_loads import LONG_LOAD_S, PendingLoads
from kvcache.connectors.vllm.refusals import refusal
from kvcache.connectors.vllm.tracing import RequestSpans
from kvcache.lower.promotion import Match
from kvcache.process import bind_to_process
from kvcache.profiles import open_stack
from kvcache.stack import Stack
from kvcache.stats import StackStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


class SchedulerSide:
    """One per engine. Owns the stack, which opens once the workers have described their shards.

    Args:
        vllm_config: of the engine.
        kv_cache_config: the scheduler's.
        identity: fields that must be equal in another engine before the two share blocks.
        clock: seconds.
        long_load_s: a load that is expected to take longer may be async.
        adapters: the LoRA adapters; by default those that `vllm_config` describes.
        open_stack: opens the stack, as `kvcache.profiles.open_stack` does.

    Attributes:
        refusal: why this engine keeps and finds no blocks; ``None`` if it does.
        stack: ``None`` until `open`, and where the engine is refused.
        pending_loads: hits that were reported to vLLM and are not loaded yet.
        events: the stack's KV events, which vLLM publishes.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        identity: Mapping[str, object],
        clock: Callable[[], float] = time.monotonic,
        *,
        long_load_s: float = LONG_LOAD_S,
        adapters: Adapters | None = None,
        open_stack: Callable[..., Stack] = open_stack,
    ) -> None:
        self._parallel = vllm_config.parallel_config
        self.refusal = refusal(vllm_config, kv_cache_config)
        if self.refusal:
            self._refuse(self.refusal)
        self._identity = identity
        self._clock = clock
        self._long_load_s = long_load_s
        self._open_stack = open_stack
        self._group = NO_GROUP if self.refusal else kept_group(kv_cache_config)
        self._kept_groups = () if self.refusal else kept_groups(kv_cache_config)
        self._adapters = adapters or Adapters.of(vllm_config, trusted="explicit" in identity)
        self._spans = RequestSpans(vllm_config.model_config.served_model_name, clock)
        self.stack: Stack | None = None
        self._slab_shards: SlabShards | None = None
        self._reports: Reports | None = None
        self._hints = HintReader()
        self.events = EventSource()
        self._events_of = partial(events_of, vllm_config, kv_cache_config, self._kept_groups)
        self._prefetches: dict[str, Future[Match]] = {}  # by request id
        self.pending_loads = PendingLoads()
        self._admitted: dict[str, AdmittedRequest[Request]] = {}  # by request id
        self._suspects = SuspectBlocks(
            self._group.block_tokens, recomputes=recomputes_failed_loads(vllm_config)
        )
        self._jobs: Jobs[Request] = Jobs(self._parallel.world_size)
        self._loads: list[Transfer] = []  # for the step being built
        self._step = 0
        self._timer = StepTimer(self._group.block_tokens, clock)
        bind_to_process(self)

    def _refuse(self, reason: str) -> None:
        """Keep and find no block until this engine ends."""
        self.refusal = reason
        log.warning("kvcache: connector: off (%s); no block is kept or found", reason)

    def open(self, handshakes: Mapping[Rank, Shard | Refusal]) -> None:
        """Open the stack for blocks of these shards, one per rank. If a rank refused, keep nothing.

        Raises:
            RuntimeError: if a rank is missing, or is on another host.
            ProfileError: if the profile is wrong.
        """
        if self.refusal:
            return
        for handshake in handshakes.values():
            if isinstance(handshake, Refusal):
                self._refuse(handshake.reason)
                return
        shards = {rank: each for rank, each in handshakes.items() if isinstance(each, Shard)}
        stack, self._slab_shards, parts = open_sharded_stack(
            self._open_stack,
            shards,
            self._parallel,
            self._kept_groups,
            identity=self._identity,
            model=self._spans.model,
        )
        async_copies = all(shard.async_copies for shard in shards.values())
        self.pending_loads = PendingLoads(async_copies=async_copies, long_load_s=self._long_load_s)
        self.stack = stack
        self._reports = Reports(stack, self._clock)
        self.events = self._events_of(stack, parts)
        self._spans.tiers = [named.name for named in stack.stats().names]

    # Before vLLM admits a request

    def add_request(self, request: Request) -> None:
        """Start to promote the blocks in lower tiers for a request that waits in vLLM's queue."""
        if self.stack is None or request.skip_reading_prefix_cache:
            return
        self._spans.start(request)
        keys, context = self._prompt_keys(request), self._spans.context(request)
        self.events.describe(request, self._kept_groups[0], range(len(keys)), keys)
        self.stack.recorder.record(keys, request.num_prompt_tokens)
        prefetch = self.stack.prefetch(keys, context=context)
        if prefetch is not None:
            self._prefetches[request.request_id] = prefetch

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """Return how many tokens after the first ``computed`` ones L1 has, and pin their blocks.

        Returns:
            ``None`` while lower tiers are being read for the request: vLLM asks again.
        """
        stack, request_id = self.stack, request.request_id
        if stack is None or request.skip_reading_prefix_cache or not self._adapters.keeps(request):
            return 0
        if (prefetch := self._prefetches.get(request_id)) is not None:
            if not prefetch.done():  # it has a deadline
                self._spans.start_wait(request)
                return None
            del self._prefetches[request_id]
            self._spans.end_prefetch(request, prefetch)
        block_tokens = self._group.block_tokens
        start = computed // block_tokens
        if (blocks := self.pending_loads.blocks(request_id, start)) is not None:
            return blocks * block_tokens
        self.pending_loads.cancel(request_id)
        context = self._spans.set_own_tokens(request, computed)
        others = bool(self._admitted)
        keys = self._keys(request, 0, request.num_tokens // block_tokens)
        if not self.pending_loads.prefers_async(len(keys) - start, others=others):
            keys = self._prompt_keys(request)
        lease = stack.fetch_local(keys, start, context=context)
        if not lease.keys:
            lease.end()
            return 0
        self.pending_loads.add(request_id, start, lease, others=others)
        return len(lease) * block_tokens

    def is_async(self, request: Request) -> bool:
        """Whether the pending load of a request is async."""
        return self.pending_loads.is_async(request.request_id)

    def admit(self, request: Request, block_ids: Sequence[Sequence[int]], tokens: int) -> None:
        """Start the load of a request that vLLM admits.

        Args:
            request: the request.
            block_ids: all that it has, by KV cache group.
            tokens: the tokens of its pending load that vLLM uses.
        """
        if self.stack is None:
            return
        request_id = request.request_id
        if self.pending_loads.end_wait(request_id):
            self._spans.end_wait(request)
            return  # admitted before its async load, and it may have become suspect meanwhile
        self._end_admission(request)  # vLLM may have preempted it
        blocks = list(self._group.block_ids(block_ids))
        admitted = self._admitted[request_id] = AdmittedRequest(request, blocks)
        pending = self.pending_loads.take(request_id)
        start = pending.start if pending is not None else 0
        self._spans.admit(request, tokens, start, self._group.block_tokens)
        if pending is None:
            return
        lease, count = pending.lease, tokens // self._group.block_tokens
        job = self._jobs.start_load(admitted, lease, start, count)
        if job is None:
            return
        if pending.is_async:
            self.pending_loads.start_wait(request_id)
            self._spans.start_wait(request)
        lease.span.add_event(telemetry.ADMITTED)
        self._suspects.load_started(job.blocks)
        self._loads.append(Transfer.of(job, request_id if pending.is_async else None))

    def finish(self, request: Request) -> None:
        """Forget a request that ended or was aborted, at any time. Its jobs end with their acks."""
        self.pending_loads.cancel(request.request_id)
        self._prefetches.pop(request.request_id, None)
        admitted = self._end_admission(request)
        if self.stack is not None and admitted is not None and (hints := self._hints.read(request)):
            context = self._spans.context(request)
            self.stack.hint(self._keys(request, 0, admitted.offered), context=context, **hints)
        self._spans.finish(request)

    def _end_admission(self, request: Request) -> AdmittedRequest[Request] | None:
        """Forget the blocks of a request. Steps in progress may still compute them."""
        admitted = self._admitted.pop(request.request_id, None)
        if admitted is not None:
            self._suspects.request_ended(admitted, self._step)
        return admitted

    # Every scheduler step

    def build_step(self, output: SchedulerOutput) -> Step | None:
        """Return the copies that the workers make around the forward pass of ``output``."""
        if self.refusal:
            return None
        if self._slab_shards is None:
            raise RuntimeError("kvcache: vLLM scheduled a step before its workers' handshake")
        self._step += 1
        step = Step(self._slab_shards, loads=self._loads, number=self._step)
        self._loads = []
        for new in output.scheduled_new_reqs:
            step.fresh += self._add_blocks(new.req_id, new.block_ids, replace=True)
        cached = output.scheduled_cached_reqs  # all blocks of a resumed one, the new ones of others
        for request_id, added in zip(cached.req_ids, cached.new_block_ids, strict=True):
            resumed = request_id in cached.resumed_req_ids
            step.fresh += self._add_blocks(request_id, added, replace=resumed)
        prefills = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            admitted = self._admitted.get(request_id)
            if admitted is None:
                continue
            computed = admitted.request.num_computed_tokens  # before this step
            if computed < admitted.request.num_prompt_tokens:
                prefills.append((computed, scheduled))
            self._suspects.compute(admitted, computed, scheduled)
            if store := self._start_store(admitted, computed + scheduled):
                step.stores.append(store)
        self._timer.built(step.number, () if step.loads else prefills)
        return step

    def _add_blocks(
        self, request_id: str, block_ids: Sequence[Sequence[int]] | None, *, replace: bool
    ) -> Sequence[int]:
        """Note and return the blocks that vLLM gave to a request: all it has, or further ones."""
        if block_ids is None:
            return ()
        added = self._group.block_ids(block_ids)
        admitted = self._admitted.get(request_id)
        if admitted is not None:
            admitted.blocks = [*([] if replace else admitted.blocks), *added]
        return added

    def _start_store(self, admitted: AdmittedRequest[Request], computed: int) -> Transfer | None:
        """Offer the blocks that this step completes, and start to store those that L1 lacks."""
        request = admitted.request
        # Drafted tokens may be rejected. Only blocks of known tokens have a hash.
        complete = self._group.complete_blocks(computed, len(request.block_hashes))
        if complete <= admitted.offered:
            return None  # most decode steps
        offered = admitted.unoffered(complete)
        if not offered or not self._adapters.keeps(request):
            return None
        assert self.stack is not None
        first, end = offered.start, offered.stop
        parent = self._keys(request, first - 1, first)[0] if first else None
        keys, context = self._keys(request, first, end), self._spans.context(request)
        self.events.describe(request, self._kept_groups[0], offered, keys)
        lease = self.stack.reserve(keys, parent, context=context)
        job = self._jobs.start_store(admitted, lease, offered)
        return Transfer.of(job) if job is not None else None

    def end_step(self, acks: Acks) -> None:
        """End the step that the workers report, and the jobs that every rank has acknowledged."""
        stack = self.stack
        if (time_of := self._timer.ended(acks.step)) is not None and stack is not None:
            stack.observe_compute(*time_of)
        self._suspects.step_reported(acks.step)
        if self._adapters.changed(done=not self._jobs):
            self._jobs.fail_stores()
        for job in self._jobs.acknowledge(acks.ranks, acks.failed, acks.seconds):
            if not job.seconds or stack is None:  # no rank has begun to copy
                continue
            stack.observe_copy(job.operation, job.seconds, failed=job.failed)
            if job.operation == "load":
                failed_blocks = len(job.lease) if job.failed else 0
                self._spans.add_load(job.request.request, job.seconds, failed_blocks)
                if not job.failed:
                    self.pending_loads.observe(len(job.lease), job.seconds)

    @property
    def copying(self) -> bool:
        """Whether a job is in progress: vLLM has to step until it has ended."""
        return bool(self._jobs)

    def fail_loads(self, blocks: Collection[int]) -> None:
        """Note that vLLM reports ``blocks`` as not loaded. Call it before `end_step`."""
        self._jobs.fail_stores()
        self._suspects.load_failed(blocks, self._admitted.values())

    def take_suspects(self) -> set[int]:
        """Return new suspect blocks, which no request may find in vLLM's prefix cache."""
        return self._suspects.take()

    # At any time

    def reset(self) -> None:
        """Forget all blocks: the weights may have changed. Running requests store nothing more."""
        if self.stack is None:
            return
        for request_id in list(self.pending_loads):
            self.pending_loads.cancel(request_id)
        for admitted in self._admitted.values():
            self._suspects.reset(admitted)
        self.stack.clear()

    @property
    def requests(self) -> set[str]:
        """Ids of the requests in any table, apart from those of spans and jobs."""
        pending = self.pending_loads
        return {*self._prefetches, *pending, *pending.waiting, *self._admitted}

    def table_sizes(self) -> dict[str, int]:
        """Return the number of entries of each table."""
        return {
            "prefetches": len(self._prefetches),
            "pending_loads": len(self.pending_loads),
            "waiting": len(self.pending_loads.waiting),
            "admitted": len(self._admitted),
            "jobs": len(self._jobs),
            "unsent_loads": len(self._loads),
            "suspect_blocks": len(self._suspects),
            "ended_requests": self._suspects.unreported,
            "steps": len(self._timer),
            "spans": len(self._spans),
        }

    def stats(self) -> StackStats | None:
        """Return the counts of the stack; ``None`` if there is no stack."""
        return self.stack.stats() if self.stack is not None else None

    def report(self) -> Stats | None:
        """Return the counts since the last report, once a second and when no request runs."""
        return self._reports.take(now=not self._admitted) if self._reports is not None else None

    def close(self) -> None:
        """End the spans of all requests, and close the stack."""
        self._spans.close()
        if self.stack is not None:
            self.stack.close()

    def _keys(self, request: Request, first: int, end: int) -> list[bytes]:
        """Return the keys of blocks ``first`` to ``end``: vLLM's hashes, with the adapter."""
        return self._adapters.keys(request, self._group.hashes(request.block_hashes, first, end))

    def _prompt_keys(self, request: Request) -> list[bytes]:
        """Return the keys of the leading blocks that leave at least one token to compute."""
        return self._keys(request, 0, (request.num_tokens - 1) // self._group.block_tokens)
