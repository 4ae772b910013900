"""A miniature of vLLM with two ranks, as far as the connector depends on it.

It reuses blocks, and has a prefix cache of its own, chunked prefill, preemption, aborts, resets,
sessions with prompts in parts, loads within the step and async loads, copies that fail on either
rank, and copies beside later steps. An engine may have both of these modes:

* `ahead`: as with async scheduling, a step is built and run before the one before it is reported.
* `reports_first`: as with drafted tokens, a step is reported before its stores start.

An engine that runs ahead recomputes blocks of failed loads wrongly, as vLLM does.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.messages import Shard
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from tests.support.miniature_workers import BLOCK, BLOCKS, RANKS, Request, WorkerReport, Workers
from tests.support.played_engine import engine_config


@dataclass
class _StepReport:
    """A step: of each request its tokens, whether one is sampled, and its `starts`."""

    workers: WorkerReport
    scheduled: dict[Request, tuple[int, bool, int]]


class MiniatureEngine:
    """vLLM's scheduler in miniature, and its workers."""

    def __init__(self, random: Random, *, ahead: bool = False, reports_first: bool = False) -> None:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
        )
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
        cache: Any = SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS)
        self.workers = Workers(random, reports_first=reports_first)
        self.side = SchedulerSide(
            engine_config(len(RANKS), ahead=ahead),
            cache,
            {},
            long_load_s=random.choice((-1.0, 1.0)),  # all loads are long, or none is
        )
        shard = Shard((4096,), host_name(), "form", async_copies=self.workers.async_copies)
        self.side.open({(0, rank): shard for rank in RANKS})
        assert self.side.stack is not None
        self.front = self.side.stack.front
        self.front.slab.wait_populated()
        self.random = random
        self.free = list(range(BLOCKS))
        self.own: dict[bytes, int] = {}
        self.users = [0] * BLOCKS
        self.ahead = ahead
        self.reports: list[_StepReport] = []
        self.allocated: set[int] = set()  # since the last step
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.remote: dict[str, Request] = {}  # that wait for async loads
        self.received: list[str] = []  # requests, once for each rank that has loaded them
        self.preempted: set[Request] = set()
        self.asked = 0
        self.keys: set[bytes] = set()

    # Events

    def ask(self) -> None:
        self.asked += 1
        tokens = self.random.choice((20, 64, 97, 130, 192))
        ends_at = tokens + self.random.choice((1, 3, 40))
        name = f"{self.asked}-{self.random.choice('xyz')}"
        self.waiting.append(Request(name, self.random.randrange(2), tokens, ends_at))

    def abort(self) -> None:
        loading = [request for request in self.remote.values() if not request.aborted]
        if requests := [*self.waiting, *self.running, *loading]:
            self._finish(self.random.choice(requests))

    def reset(self) -> None:
        if self.random.random() < 0.5:
            for request in self.running[::-1]:
                self._preempt(request)
        self.workers.resets += 1
        self.own.clear()  # also while requests run: then the connector evicts the blocks
        self.side.reset()
        self._evict()
        assert self.front.stats().used_blocks == 0

    def step(self) -> None:
        new: list[Request] = []
        more: dict[Request, list[int]] = {}
        running = len(self.running)
        scheduled = self._schedule_running(more)
        if running == len(self.running):  # after a preemption vLLM admits no request
            self._admit(new, scheduled)
        before = {request: request.num_computed_tokens for request in self.running}
        resumed = [request for request in new if request in self.preempted]
        self.preempted.difference_update(resumed)
        cached = [*more, *resumed]
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=request.request_id, block_ids=([*request.blocks],))
                for request in new
                if request not in resumed
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[request.request_id for request in cached],
                new_block_ids=[
                    ([*request.blocks],) if request in resumed else (more[request],)
                    for request in cached
                ],
                resumed_req_ids={request.request_id for request in resumed},
            ),
            num_scheduled_tokens={r.request_id: tokens for r, tokens in scheduled.items()},
        )
        step = self.side.build_step(output)
        assert step is not None
        loaded = [block for load in step.loads if load.awaited_by for block in load.blocks]
        assert self.allocated <= {*step.fresh, *loaded}
        self.allocated.clear()
        self._evict()
        built: dict[Request, tuple[int, bool, int]] = {}
        for request, tokens in scheduled.items():
            request.num_computed_tokens += tokens
            samples = request.num_computed_tokens == request.num_tokens + request.placeholders
            request.placeholders += samples
            built[request] = tokens, samples, request.starts
        self.reports.append(_StepReport(self.workers.work(step, scheduled, before), built))
        if not self.ahead or len(self.reports) > 1:
            self._report()
        self._check()

    def _report(self) -> None:
        """Process the report of a step, in vLLM's order."""
        report = self.reports.pop(0)
        workers = report.workers
        affected = self._set_back(workers.failed_blocks, report.scheduled)
        for request, (_, samples, starts) in report.scheduled.items():
            if request in affected or request not in self.running or request.starts != starts:
                continue
            if samples:
                request.placeholders = max(0, request.placeholders - 1)
                request.num_tokens += 1
                if request.num_tokens >= request.ends_at:
                    self._end(request)
        if workers.failed_blocks:
            self.side.fail_loads(workers.failed_blocks)
            self._evict()
        self.side.end_step(workers.acks)
        self._receive(workers.received)

    def _evict(self) -> None:
        """Remove suspect blocks from the engine's own prefix cache."""
        suspects = self.side.take_suspects()
        self.own = {key: block for key, block in self.own.items() if block not in suspects}

    # The scheduler

    def _chunk(self, request: Request, computed: int) -> int:
        left = request.num_tokens + request.placeholders - computed
        return min(left, self.random.choice((7, 32, 50, 200)))

    def _schedule_running(self, more: dict[Request, list[int]]) -> dict[Request, int]:
        scheduled: dict[Request, int] = {}
        for request in self.running[:]:
            if request not in self.running:
                continue
            tokens = self._chunk(request, request.num_computed_tokens)
            end = request.num_computed_tokens + tokens
            need = max(0, -(-end // BLOCK) - len(request.blocks))
            while need > len(self.free) and request in self.running:
                self._preempt(self.running[-1])
            if request not in self.running:
                break
            more[request] = self._allocate(need)
            request.blocks += more[request]
            self._cache(request, end)
            scheduled[request] = tokens
        return scheduled

    def _admit(self, new: list[Request], scheduled: dict[Request, int]) -> None:
        while self.waiting:
            request = self.waiting[0]
            own, promised, later = request.blocks, 0, False
            computed = request.num_computed_tokens
            if not computed:
                own = self._found(request)
                promised_or_not = self.side.matched_tokens(request, len(own) * BLOCK)
                assert promised_or_not is not None
                promised, later = promised_or_not, self.side.is_async(request)
                computed = len(own) * BLOCK + promised
            assert computed <= request.num_tokens - (not later)
            tokens = 0 if later else self._chunk(request, computed)
            need = max(0, -(-(computed + tokens) // BLOCK) - len(own))
            if need > len([block for block in self.free if block not in own]):
                break
            if own is not request.blocks:
                for block in own:
                    self.users[block] += 1
                    if block in self.free:
                        self.free.remove(block)
            request.blocks = own + self._allocate(need)
            self.side.admit(request, (request.blocks,), promised)
            request.num_computed_tokens = computed
            self.waiting.pop(0)
            if later:
                self.remote[request.request_id] = request
                continue
            self._cache(request, computed + tokens)
            self.running.append(request)
            new.append(request)
            scheduled[request] = tokens

    def _found(self, request: Request) -> list[int]:
        """Return the blocks of a request in the engine's own cache, less the last token's."""
        own: list[int] = []
        for key in request.block_hashes[: (request.num_tokens - 1) // BLOCK]:
            if key not in self.own:
                break
            own.append(self.own[key])
        return own

    def _receive(self, names: list[str]) -> None:
        """Note loads that ranks have ended. After the last rank's, the request goes on or ends."""
        self.received += names
        for name in {name for name in names if self.received.count(name) == len(RANKS)}:
            self.received = [other for other in self.received if other != name]
            request = self.remote.pop(name)
            if request.aborted or not request.num_computed_tokens:
                self._release(request)
            else:
                self._cache(request, request.num_computed_tokens)
                # vLLM recomputes the last token of a prompt that was loaded as a whole.
                most = request.num_tokens - 1
                request.num_computed_tokens = min(request.num_computed_tokens, most)
            if not request.aborted:
                self.waiting.insert(0, request)

    def _allocate(self, count: int) -> list[int]:
        blocks, self.free = self.free[:count], self.free[count:]
        self.allocated.update(blocks)
        self.workers.allocate(blocks)
        for block in blocks:
            self.users[block] = 1
        self.own = {key: block for key, block in self.own.items() if block not in blocks}
        return blocks

    def _cache(self, request: Request, end: int) -> None:
        """Add blocks to the own cache before they are computed, as vLLM does."""
        for key, block in zip(request.block_hashes[: end // BLOCK], request.blocks, strict=False):
            self.keys.add(key)
            self.own.setdefault(key, block)

    def _release(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.blocks = []
        request.num_computed_tokens = request.placeholders = 0
        request.wrong, request.partial = False, (-1, 0)
        request.starts += 1

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.insert(0, request)
        self.preempted.add(request)

    def _finish(self, request: Request) -> None:
        self.preempted.discard(request)
        self.side.finish(request)
        if request.request_id in self.remote:
            request.aborted = True
            return
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)

    def _end(self, request: Request) -> None:
        """Finish a request, or continue it as a session, which keeps its blocks."""
        if self.ahead or self.random.random() < 0.6:
            self._finish(request)
            return
        self.running.remove(request)
        request.placeholders = 0
        request.num_tokens += self.random.choice((1, 30, 70))
        request.ends_at = request.num_tokens + self.random.choice((1, 3, 40))
        self.waiting.append(request)

    def _set_back(
        self, failed_blocks: set[int], scheduled: dict[Request, tuple[int, bool, int]]
    ) -> set[Request]:
        """Set requests back to their first failed block; the first that has it recomputes it."""
        affected = set()
        for sharing in ([*self.remote.values()], self.running):
            marked: set[int] = set()
            for request in sharing:
                tokens, *_ = scheduled.get(request, (0,))
                computed = request.num_computed_tokens - tokens
                whole = request.blocks[: -(-computed // BLOCK)]
                if failed_blocks.isdisjoint(whole):
                    continue
                affected.add(request)
                first = next(
                    (at for at, b in enumerate(whole) if b in failed_blocks - marked), None
                )
                marked.update(failed_blocks.intersection(whole))
                request.num_computed_tokens = computed if first is None else first * BLOCK
                request.placeholders = 0
                if not self.ahead:
                    request.wrong = False
        return affected

    # Invariants

    def _check(self) -> None:
        stats = self.front.stats()
        assert stats.used_blocks <= stats.capacity_blocks
        for key in self.keys:
            lease = self.front.pin([key])
            for slot in lease.slots:
                for rank in RANKS:
                    right = (key, self.workers.resets)
                    assert self.workers.slots[rank][slot] == right, (key, rank)
            lease.end()
        working = self.workers.loads or self.workers.stores or self.workers.unreported.ranks
        assert self.side.copying or not working
        assert working or self.reports or not self.side.copying
        there = [*self.running, *self.waiting, *self.remote.values()]
        assert self.side.requests <= {request.request_id for request in there}

    def end(self) -> None:
        """Abort all requests, and check that nothing is left."""
        for request in [*self.waiting, *self.running, *self.remote.values()]:
            if not request.aborted:
                self._finish(request)
        while self.side.copying:  # vLLM steps until then, too
            self.step()
        while self.reports:
            self._report()
        assert sorted(self.free) == list(range(BLOCKS))
        side = self.side
        assert not side.requests
        sizes = side.table_sizes()
        assert sizes["jobs"] == sizes["unsent_loads"] == 0
        assert self.front.stats().pinned_slots == 0
        side.close()
