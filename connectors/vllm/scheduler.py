"""The scheduler's half of the vLLM connector: keys, leases and promises; no tensors, no bytes.

1. Only blocks that are pinned in L1 are promised. The lease of a promise is kept until the request
   is admitted (it becomes a load), asks again from elsewhere, or is finished.
2. A hit that comes with the step leaves at least one token to compute. Of one that comes later vLLM
   computes the last token anew, so that it may be all there is.
3. Every full block of an admitted request is offered once its KV has been computed, prompt and
   generated tokens alike, those that vLLM found in its own cache included.
4. A job's lease ends when every rank has acked it. When one failed, a loaded block is dropped and a
   stored one is not published, and the request offers it again. What depends on a block that was
   not loaded is not published, however late the failure is reported (`doubt`).
5. How long the engine takes to compute a block is measured over the steps that compute prompts:
   from when a step was built, or the one before it has ended, until it has ended.
6. A load that would hold up the others' step is not awaited by it: its request is scheduled when it
   is over. Copies that are made in the step are always awaited.
7. After ``reset`` nothing computed before it is promised or published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from kvcache import telemetry
from kvcache.connectors.jobs import Job, Jobs
from kvcache.connectors.vllm.adapters import SETTINGS, Adapters
from kvcache.connectors.vllm.compat import host_name, replica_of
from kvcache.connectors.vllm.events import EventSource, events_of
from kvcache.connectors.vllm.hints import hints_of
from kvcache.connectors.vllm.identity import chosen
from kvcache.connectors.vllm.messages import Acks, Rank, Refusal, Shard, SlabShards, Step, Transfer
from kvcache.connectors.vllm.metrics import Reports, Stats
from kvcache.connectors.vllm.pending_loads import PendingLoads
from kvcache.connectors.vllm.refusals import refusal
from kvcache.connectors.vllm.suspects import Running, SuspectBlocks, recomputes
from kvcache.connectors.vllm.tracing import Requests
from kvcache.keys import namespace
from kvcache.lower.promotion import Match
from kvcache.process import bind_to_process
from kvcache.profiles import open_stack
from kvcache.slab import Slab
from kvcache.stack import Stack
from kvcache.stats import StackStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


class SchedulerSide:
    """One per engine; owns the stack, which is opened when the workers said what a block is.

    ``identity`` is what another engine must agree with before they may share a block.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        identity: Mapping[str, object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parallel = vllm_config.parallel_config
        self._refusal: str | None = None
        if reason := refusal(vllm_config, kv_cache_config):
            self._refuse(reason)
        self._identity = identity
        self._clock = clock
        self._block_tokens = 0
        self._hashes_per_block = 1
        if not self._refusal:
            self._block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            hashed = getattr(kv_cache_config, "hash_block_size", None) or self._block_tokens
            self._hashes_per_block = self._block_tokens // hashed
        settings = chosen(getattr(vllm_config, "lora_config", None), SETTINGS)
        self._adapters = Adapters(settings, trusted="explicit" in identity)
        self._requests = Requests(vllm_config.model_config.served_model_name, clock)
        self._stack: Stack | None = None
        self._memory: SlabShards | None = None
        self._reports: Reports | None = None
        self.events = EventSource()
        self._events_of = partial(events_of, vllm_config, kv_cache_config)
        self._coming: dict[str, Future[Match]] = {}  # by request: what lower tiers have of it
        self._promised = PendingLoads()
        self._running: dict[str, Running] = {}
        self._doubt = SuspectBlocks(self._block_tokens, recomputes=recomputes(vllm_config))
        self._jobs: Jobs[Running] = Jobs(self._parallel.world_size)
        self._loads: list[Transfer] = []  # for the step being built
        self._step = 0
        self._steps: dict[int, tuple[float, float, float]] = {}  # when built, blocks, mean depth
        self._ended = 0.0  # when the last one had
        bind_to_process(self)

    def _refuse(self, reason: str) -> None:
        """Keep nothing, and give nothing, for as long as this engine runs."""
        self._refusal = reason
        log.warning("kvcache: nothing is kept or found: %s", reason)

    def open(self, answers: Mapping[Rank, Shard | Refusal]) -> None:
        """Open the stack for blocks of these shards, one per rank. If a rank refused, keep nothing.

        Raises:
            RuntimeError: when a rank is missing, or is on another host.
            ProfileError: when the profile is not right.
        """
        if self._refusal:
            return
        for answer in answers.values():
            if isinstance(answer, Refusal):
                self._refuse(answer.reason)
                return
        shards = {rank: shard for rank, shard in answers.items() if isinstance(shard, Shard)}
        if len(shards) != (world := self._parallel.world_size):
            raise RuntimeError(
                f"kvcache: {len(shards)} of {world} workers said what their blocks are"
            )
        offsets, block_nbytes = dict[Rank, int](), 0
        for rank, shard in sorted(shards.items()):
            if shard.host != host_name():
                raise RuntimeError(
                    f"kvcache: the worker of pipeline rank {rank[0]}, tensor rank {rank[1]} is on "
                    f"another host ({shard.host}) than the scheduler ({host_name()}); L1 is memory "
                    "that one host shares, so all ranks of an engine must be on it"
                )
            offsets[rank] = block_nbytes
            block_nbytes += shard.nbytes
        self._promised.async_copies = all(shard.async_copies for shard in shards.values())
        formats = {f"rank {rank}": each.format_id for rank, each in shards.items()}
        self._stack = open_stack(
            block_nbytes=block_nbytes,
            namespace=namespace({**self._identity, **formats}),
            identity={"model": self._requests.model, **self._identity, **formats},
            element_nbytes=max(shard.element_nbytes for shard in shards.values()),
            block_tokens=self._block_tokens,
            ranks=world,
            replica=replica_of(self._parallel),
        )
        descriptor = self._stack.front.slab.descriptor
        Slab.attach(descriptor).close()  # what no worker could do either is said now
        self._memory = SlabShards(descriptor, offsets)
        self._reports = Reports(self._stack, self._clock)
        self.events = self._events_of(self._stack)
        self._requests.tiers = [named.name for named in self._stack.stats().names]
        log.info(
            "kvcache: profile %s, L1 of %.1f GiB: %d blocks of %d tokens, %d bytes each",
            self._stack.profile,
            descriptor.slots * descriptor.slot_nbytes / 2**30,
            descriptor.slots,
            self._block_tokens,
            block_nbytes,
        )

    # Before a request is admitted

    def arrived(self, request: Request) -> None:
        """A request is waiting: what lower tiers have of it begins to come up."""
        if self._stack is None or request.skip_reading_prefix_cache:
            return
        self._requests.arrived(request)
        keys, context = self._prompt_keys(request), self._requests.context(request)
        self.events.describe(request, 0, keys, None, self._adapters.keys)
        self._stack.recorder.record(keys, request.num_prompt_tokens)
        coming = self._stack.prefetch(keys, context=context)
        if coming is not None:
            self._coming[request.request_id] = coming

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """Tokens beyond ``computed`` that are in L1, pinned for this request from now on.

        ``None`` while lower tiers are still being read for it: ask again.
        """
        stack = self._stack
        if stack is None or request.skip_reading_prefix_cache or not self._adapters.keeps(request):
            return 0
        if (coming := self._coming.get(request.request_id)) is not None:
            if not coming.done():  # it has a deadline
                self._requests.waits(request)
                return None
            del self._coming[request.request_id]
            self._requests.prefetched(request, coming)
        start = computed // self._block_tokens
        if (promised := self._promised.blocks(request.request_id, start)) is not None:
            return promised * self._block_tokens
        self._promised.withdraw(request.request_id)
        context = self._requests.asks(request, computed)
        others = bool(self._running)
        keys = self._keys(request, 0, request.num_tokens // self._block_tokens)
        if not self._promised.later(len(keys) - start, others=others):
            keys = self._prompt_keys(request)
        lease = stack.fetch_local(keys, start, context=context)
        if not lease.keys:
            lease.end()
            return 0
        self._promised.give(request.request_id, start, lease, others=others)
        return len(lease) * self._block_tokens

    def comes_later(self, request: Request) -> bool:
        """Whether what is promised is there later than in the next step."""
        return self._promised.comes_later(request.request_id)

    def admitted(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """The engine took the request with ``tokens`` of its promise; ``blocks`` are all it has."""
        if self._stack is None:
            return
        if self._promised.arrives(request.request_id):
            self._requests.goes_on(request)
            return  # it runs already, unless everything was reset while its load went on
        self._gave_back(request)  # where it was preempted
        running = self._running[request.request_id] = Running(request, [*blocks[0]])
        promised = self._promised.redeem(request.request_id)
        start = promised.start if promised is not None else 0
        self._requests.admitted(request, tokens, start, self._block_tokens)
        if promised is None:
            return
        lease = promised.lease
        count = tokens // self._block_tokens
        if not count:
            lease.end()
            return
        if promised.later:
            self._promised.expect(request.request_id)
            self._requests.waits(request)
        lease.span.add_event(telemetry.ADMITTED)
        loaded = list(blocks[0][start : start + count])
        self._doubt.loads(loaded)
        self._loads.append(
            Transfer(
                self._jobs.begin(Job(lease, running, start, "load")),
                loaded,
                list(lease.slots[:count]),
                telemetry.trace_headers(lease.span),
                request.request_id if promised.later else None,
            )
        )

    def finished(self, request: Request) -> None:
        """The request is done or aborted, at whatever point. Jobs under way end with their acks."""
        self._promised.withdraw(request.request_id)
        self._coming.pop(request.request_id, None)
        running = self._gave_back(request)
        if self._stack is not None and running is not None and (hints := hints_of(request)):
            context = self._requests.context(request)
            self._stack.hint(self._keys(request, 0, running.offered), context=context, **hints)
        self._requests.finished(request)

    def _gave_back(self, request: Request) -> Running | None:
        """A request has its blocks no more; steps under way may still compute in them."""
        running = self._running.pop(request.request_id, None)
        if running is not None:
            self._doubt.ended(running, self._step)
        return running

    # Every step

    def step(self, output: SchedulerOutput) -> Step | None:
        """What the workers have to copy around the forward pass of ``output``."""
        if self._refusal:
            return None
        if self._memory is None:
            raise RuntimeError("kvcache: the workers never said what their blocks are")
        self._step += 1
        step = Step(self._memory, loads=self._loads, number=self._step)
        self._loads = []
        for new in output.scheduled_new_reqs:
            step.fresh += self._extend(new.req_id, new.block_ids, whole=True)
        cached = output.scheduled_cached_reqs  # all blocks of a resumed one, the new ones of others
        for request_id, more in zip(cached.req_ids, cached.new_block_ids, strict=True):
            step.fresh += self._extend(request_id, more, whole=request_id in cached.resumed_req_ids)
        prefilled = context = 0.0  # tokens, and summed over them those before each
        for request_id, scheduled in output.num_scheduled_tokens.items():
            running = self._running.get(request_id)
            if running is None:
                continue
            if running.request.num_computed_tokens < running.request.num_prompt_tokens:
                prefilled += scheduled
                context += scheduled * (running.request.num_computed_tokens + scheduled / 2)
            self._doubt.computes(running, scheduled)
            if store := self._offer(running, scheduled):
                step.stores.append(store)
        blocks = 0.0 if step.loads else prefilled / self._block_tokens
        depth = context / max(1.0, prefilled * self._block_tokens)
        self._steps[step.number] = self._clock(), blocks, depth
        return step

    def _extend(
        self, request_id: str, block_ids: Sequence[Sequence[int]] | None, *, whole: bool
    ) -> Sequence[int]:
        """Note the blocks that a request was given, all it has or more; they are returned."""
        if block_ids is None:
            return ()
        running = self._running.get(request_id)
        if running is not None:
            running.blocks = [*([] if whole else running.blocks), *block_ids[0]]
        return block_ids[0]

    def _offer(self, running: Running, scheduled: int) -> Transfer | None:
        """Reserve slots for the blocks of ``running`` that this step completes."""
        request = running.request
        # Drafted tokens may be rejected: only blocks of known tokens have a hash, and they count.
        computed = request.num_computed_tokens + scheduled
        first = running.offered
        full = min(
            computed // self._block_tokens, len(request.block_hashes) // self._hashes_per_block
        )
        if running.doubtful is not None:
            full = min(full, running.doubtful)
        if full <= first or not self._adapters.keeps(request):
            return None
        assert self._stack is not None
        running.offered = full
        after = self._keys(request, first - 1, first)[0] if first else None
        keys, context = self._keys(request, first, full), self._requests.context(request)
        self.events.describe(request, first, keys, after, self._adapters.keys)
        lease = self._stack.reserve(keys, after, context=context)
        if not lease.keys:
            lease.end()
            return None
        return Transfer(
            self._jobs.begin(Job(lease, running, first, "store")),
            [running.blocks[first + at] for at in lease.positions],
            list(lease.slots),
            telemetry.trace_headers(lease.span),
        )

    def acked(self, acks: Acks) -> None:
        """End the step, and the jobs that every rank is through with."""
        for number in [number for number in self._steps if number <= acks.step]:
            built, blocks, depth = self._steps.pop(number)
            if number == acks.step and self._stack is not None:
                begun, self._ended = max(built, self._ended), self._clock()
                self._stack.observe_compute(blocks, self._ended - begun, depth)
        self._doubt.reported(acks.step)
        if self._adapters.changed(done=not self._jobs):
            self._jobs.fail_stores()
        for job in self._jobs.acked(acks.ranks, acks.failed, acks.seconds):
            if job.seconds and self._stack is not None:  # else no rank has begun to copy
                self._stack.observe_copy(job.operation, job.seconds, failed=job.failed)
                if job.operation == "load":
                    failed = len(job.lease) if job.failed else 0
                    self._requests.loaded(job.owner.request, job.seconds, failed)
                    if not failed:
                        self._promised.loaded(len(job.lease), job.seconds)
            if job.failed:
                job.owner.offered = min(job.owner.offered, job.at)

    @property
    def copying(self) -> bool:
        """Whether some job has not ended: the engine has to step until it has."""
        return bool(self._jobs)

    def failed(self, bad: Collection[int]) -> None:
        """A report says that ``bad`` blocks of the engine were not loaded. Call before `acked`."""
        self._jobs.fail_stores()
        self._doubt.failed(bad, self._running.values())

    def take_doubtful(self) -> set[int]:
        """Blocks that no request may find in vLLM's prefix cache, new since the last call."""
        return self._doubt.take()

    # Whenever

    def reset(self) -> None:
        """Forget everything: the weights may have changed. What goes on running is kept no more."""
        if self._stack is None:
            return
        for request_id in list(self._promised):
            self._promised.withdraw(request_id)
        for running in self._running.values():
            self._doubt.outdated(running)
        self._stack.clear()

    def stats(self) -> StackStats | None:
        return self._stack.stats() if self._stack is not None else None

    def report(self) -> Stats | None:
        """What was counted since the last report: once a second, and when no request is left."""
        return self._reports.take(now=not self._running) if self._reports is not None else None

    def close(self) -> None:
        self._requests.close()
        if self._stack is not None:
            self._stack.close()

    def _keys(self, request: Request, first: int, end: int) -> list[bytes]:
        """The keys of blocks ``first`` to ``end``: vLLM's own chained hashes, and the adapter."""
        per = self._hashes_per_block
        hashes: list[bytes] = request.block_hashes[first * per + per - 1 : end * per : per]
        return self._adapters.keys(request, hashes)

    def _prompt_keys(self, request: Request) -> list[bytes]:
        """The keys of all blocks of which one token at least is left to compute after them."""
        return self._keys(request, 0, (request.num_tokens - 1) // self._block_tokens)
