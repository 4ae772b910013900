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
from functools import partial
from typing import TYPE_CHECKING

from kvcache import telemetry
from kvcache.connectors.jobs import AdmittedRequest, Jobs
from kvcache.connectors.step_timer import StepTimer
from kvcache.connectors.suspects import SuspectBlocks
from kvcache.connectors.vllm.compat import hash_tokens, recomputes_failed_loads
from kvcache.connectors.vllm.groups import KeptGroup, kept_groups, may_load_within_step
from kvcache.connectors.vllm.identity.adapters import Adapters
from kvcache.connectors.vllm.messages import Acks, Rank, Refusal, Shard, SlabShards, Step, Transfer
from kvcache.connectors.vllm.metrics import Reports, Stats
from kvcache.connectors.vllm.refusals import refusal
from kvcache.connectors.vllm.scheduler.copies import NO_BLOCK, PieceCopies
from kvcache.connectors.vllm.scheduler.events import EventSource, events_of
from kvcache.connectors.vllm.scheduler.handshake import FirstHandshake, open_sharded_stack
from kvcache.connectors.vllm.scheduler.hints import HintReader
from kvcache.connectors.vllm.scheduler.lookups import Lookups
from kvcache.connectors.vllm.scheduler.offers import HandOff, Offers
from kvcache.connectors.vllm.scheduler.pending_loads import LONG_LOAD_S, PendingLoads
from kvcache.connectors.vllm.scheduler.request_keys import RequestKeys
from kvcache.connectors.vllm.scheduler.tracing import RequestSpans
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
        self._clock, self._long_load_s = clock, long_load_s
        self._first_handshake = FirstHandshake()
        self._open_stack = open_stack
        self._groups: Sequence[KeptGroup] = ()
        if not self.refusal:
            self._groups = kept_groups(kv_cache_config, hash_tokens(vllm_config, kv_cache_config))
        self._within_step = may_load_within_step(self._groups)
        sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        block_tokens = self._groups[0].block_tokens if self._groups else 0
        self._adapters = adapters or Adapters.of(vllm_config, trusted="explicit" in identity)
        self._keys = RequestKeys(self._groups, [1] * len(self._groups), self._adapters)
        self._copies = PieceCopies((), self._groups)
        self._offers = Offers(self._keys, self._copies)
        self._lookups: Lookups | None = None
        self._spans = RequestSpans(vllm_config.model_config.served_model_name, clock)
        self.stack: Stack | None = None
        self._slab_shards: SlabShards | None = None
        self._reports: Reports | None = None
        self._hints = HintReader()
        self.events = EventSource()
        self._events_of = partial(events_of, vllm_config, kv_cache_config, self._groups)
        self.pending_loads = PendingLoads()
        self._admitted: dict[str, AdmittedRequest[Request]] = {}  # by request id
        self._suspects = SuspectBlocks(
            sizes,
            recomputes=recomputes_failed_loads(vllm_config),
            no_block=None if self._within_step else NO_BLOCK,
        )
        self._jobs: Jobs[Request] = Jobs(self._parallel.world_size)
        self._loads: list[Transfer] = []  # for the step being built
        self._step = 0
        self._timer = StepTimer(block_tokens, clock)
        bind_to_process(self)

    def _refuse(self, reason: str) -> None:
        """Keep and find no block until this engine ends."""
        self.refusal = reason
        log.warning("kvcache: connector: off (%s); no block is kept or found", reason)

    def open(self, handshakes: Mapping[Rank, Shard | Refusal]) -> None:
        """Open the stack for blocks of these shards, one per rank. If a rank refused, keep nothing.

        Raises:
            RuntimeError: if a rank is missing, is on another host, or changed its shard.
            ProfileError: if the profile is wrong.
        """
        if self.refusal or self._first_handshake.is_repeated_by(handshakes):
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
            self._groups,
            identity=self._identity,
            model=self._spans.model,
        )
        self._keys = RequestKeys(self._groups, parts, self._adapters)
        self._copies = PieceCopies(self._slab_shards.pieces, self._groups)
        self._offers = Offers(self._keys, self._copies)
        self.pending_loads = PendingLoads(
            async_copies=all(shard.async_copies for shard in shards.values()),
            within_step=self._within_step,
            long_load_s=self._long_load_s,
        )
        self.stack = stack
        self._reports = Reports(stack, self._clock)
        self.events = self._events_of(stack, parts)
        self._lookups = Lookups(
            stack, self._keys, self.pending_loads, self._spans, self.events,
            within_step=self._within_step,
        )  # fmt: skip
        self._spans.tiers = [named.name for named in stack.stats().names]

    # Before vLLM admits a request

    def add_request(self, request: Request) -> None:
        """Start to promote the blocks in lower tiers for a request that waits in vLLM's queue."""
        if self._lookups is not None:
            self._lookups.add(request)

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """Return how many tokens after the first ``computed`` ones L1 has, and pin their blocks.

        Returns:
            ``None`` while lower tiers are being read for the request: vLLM asks again.
        """
        if self._lookups is None:
            return 0
        return self._lookups.tokens(request, computed, others=bool(self._admitted))

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
        tables = [list(table) for table in block_ids]
        admitted = AdmittedRequest(request, tables, [0] * len(self._groups))
        self._admitted[request_id] = admitted
        pending = self.pending_loads.take(request_id)
        self._spans.admit(request, tokens, pending.own if pending is not None else 0, self._groups)
        if pending is None:
            return
        firsts = [pending.own // group.block_tokens for group in self._groups]
        copies = self._copies.to_load(self._keys.of(request), tables, pending, tokens)
        job = self._jobs.start("load", admitted, pending.lease, copies, firsts)
        if job is None:
            return
        if pending.is_async:
            self.pending_loads.start_wait(request_id)
            self._spans.start_wait(request)
        pending.lease.span.add_event(telemetry.ADMITTED)
        self._suspects.load_started(copies.blocks)
        self._loads.append(Transfer.of(job, request_id if pending.is_async else None))

    def finish(self, request: Request) -> None:
        """Forget a request that ended or was aborted, at any time. Its jobs end with their acks."""
        if self._lookups is not None:
            self._lookups.forget(request.request_id)
        admitted = self._end_admission(request)
        if self.stack is not None and admitted is not None and (hints := self._hints.read(request)):
            keys, context = self._keys.of(request), self._spans.context(request)
            self.stack.hint_resume(keys, request.num_computed_tokens, context=context, **hints)
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
        state = None if self._within_step else output.kv_connector_block_state
        hand_offs = state.boundary_state_offloads if state else {}
        prefills = []
        scheduled_tokens = output.num_scheduled_tokens
        for request_id in {**scheduled_tokens, **hand_offs} if hand_offs else scheduled_tokens:
            admitted = self._admitted.get(request_id)
            if admitted is None:
                continue
            scheduled = scheduled_tokens.get(request_id, 0)
            computed = admitted.request.num_computed_tokens  # before this step
            if scheduled and computed < admitted.request.num_prompt_tokens:
                prefills.append((computed, scheduled))
            of_request = hand_offs.get(request_id, ())
            if state and (of_request or admitted.first_suspect is not None):
                # Only vLLM knows which blocks a group has given back.
                admitted.tables = [list(ids) for ids in state.get_block_ids(request_id)]
            if scheduled:
                self._suspects.compute(admitted, computed, scheduled)
            end = computed + scheduled
            if store := self._start_store(admitted, computed, end, of_request):
                step.stores.append(store)
        self._timer.built(step.number, () if step.loads else prefills)
        return step

    def _add_blocks(
        self, request_id: str, block_ids: Sequence[Sequence[int]] | None, *, replace: bool
    ) -> Sequence[int]:
        """Note and return the blocks that vLLM gave to a request: all it has, or further ones."""
        if block_ids is None:
            return ()
        admitted = self._admitted.get(request_id)
        if admitted is not None:
            admitted.tables = [
                [*([] if replace else table), *added]
                for table, added in zip(admitted.tables, block_ids, strict=True)
            ]
        return [block for added in block_ids for block in added]

    def _start_store(
        self,
        admitted: AdmittedRequest[Request],
        computed: int,
        end: int,
        hand_offs: Sequence[HandOff],
    ) -> Transfer | None:
        """Offer the blocks that this step completes, and start to store those that L1 lacks."""
        request, before = admitted.request, list(admitted.offered)
        offered = self._offers.find(admitted, computed, end, hand_offs)
        if not offered or not self._adapters.keeps(request):
            return None
        assert self.stack is not None
        chains, sides = self._offers.branches(request, offered)
        if self.events.publishes:
            for each in offered:
                self.events.describe(request, each.group, each.blocks, each.keys)
        lease = self.stack.reserve_branches(chains, sides, context=self._spans.context(request))
        copies = self._offers.copies(offered, lease)
        job = self._jobs.start("store", admitted, lease, copies, before)
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
        prefetches = self._lookups.prefetches if self._lookups is not None else ()
        return {*prefetches, *pending, *pending.waiting, *self._admitted}

    def table_sizes(self) -> dict[str, int]:
        """Return the number of entries of each table."""
        return {
            "prefetches": len(self._lookups.prefetches) if self._lookups is not None else 0,
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
