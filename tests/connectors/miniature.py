"""A vLLM engine in miniature, with two ranks: as far as it matters to the connector.

Blocks that are reused, a prefix cache of its own, chunks, preemption, aborts, resets, copies that
fail on either rank, and copies that go on beside later steps and read a block at the latest when it
is handed out again. A block's content is the key it should have and the number of the reset after
which all of it was computed, or None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks, Shard, Transfer
from kvcache.connectors.vllm.scheduler import SchedulerSide
from kvcache.connectors.vllm.support import host_name

BLOCK = 32
BLOCKS = 14
SLOTS = 9
SHARED = 3  # leading blocks that all prompts of a family have in common
RANKS = (0, 1)

Content = tuple[bytes, int] | None


@dataclass(eq=False)
class Request:
    """A request as the connector sees it, and when it ends."""

    request_id: str
    family: int
    num_tokens: int
    ends_at: int
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    stale: bool = False  # runs on what was computed before a reset
    blocks: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 1 << 30
    trace_headers: dict[str, str] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def block_hashes(self) -> list[bytes]:
        return [
            f"{self.family}{self.request_id[-1] if n >= SHARED else ''}/{n}".encode()
            for n in range(self.num_tokens // BLOCK)
        ]


@dataclass(eq=False)
class Copying:
    """A copy that was begun on one rank; `read` is the content of what it has read, by slot."""

    rank: int
    what: Transfer
    read: dict[int, Content] = field(default_factory=dict)


class Miniature:
    """The engine: its scheduler, its workers, and what lies in every block and slot."""

    def __init__(self, random: Random) -> None:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
        )
        parallel: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=len(RANKS)),
            model_config=SimpleNamespace(served_model_name="model"),
        )
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
        cache: Any = SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS)
        self.side = SchedulerSide(parallel, cache, {})
        self.side.open({(0, rank): Shard(4096, host_name(), "form") for rank in RANKS})
        assert self.side._stack is not None
        self.front = self.side._stack.front
        self.front.slab.wait_populated()
        self.random = random
        self.free = list(range(BLOCKS))
        self.own: dict[bytes, int] = {}
        self.users = [0] * BLOCKS
        self.kv: list[list[Content]] = [[None] * BLOCKS for _ in RANKS]
        self.slots: list[list[Content]] = [[None] * SLOTS for _ in RANKS]
        self.late = random.random() < 0.5  # whether copies go on when the step has ended
        self.stores: list[Copying] = []
        self.loads: list[Copying] = []
        self.given: set[int] = set()  # blocks, since the last step
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted: set[Request] = set()
        self.resets = 0
        self.asked = 0
        self.keys: set[bytes] = set()

    # What happens to it

    def ask(self) -> None:
        self.asked += 1
        tokens = self.random.choice((20, 64, 97, 130, 192))
        ends_at = tokens + self.random.choice((1, 3, 40))
        name = f"{self.asked}-{self.random.choice('xyz')}"
        self.waiting.append(Request(name, self.random.randrange(2), tokens, ends_at))

    def abort(self) -> None:
        if everyone := [*self.waiting, *self.running]:
            self._finish(self.random.choice(everyone))

    def reset(self) -> None:
        if self.random.random() < 0.5:
            for request in self.running[::-1]:
                self._preempt(request)
        for request in self.running:
            request.stale = True
        self.resets += 1
        self.own.clear()
        self.side.reset()
        assert self.front.stats().used_blocks == 0

    def step(self) -> None:
        before = {request: request.num_computed_tokens for request in self.running}
        new: list[Request] = []
        more: dict[Request, list[int]] = {}
        scheduled = self._schedule_running(more)
        if len(before) == len(self.running):  # after a preemption nobody is admitted
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
        step = self.side.step(output)
        assert step is not None
        assert self.given <= set(step.fresh)
        self.given.clear()
        for request, tokens in scheduled.items():
            request.num_computed_tokens += tokens
        bad, acks = self._work(step.loads, step.stores, scheduled, before)
        if acks.ranks:
            self.side.acked(acks)
        affected = self._take_back(bad, before)
        for request in scheduled:
            if request not in affected and request.num_computed_tokens == request.num_tokens:
                request.num_tokens += 1
                if request.num_tokens >= request.ends_at:
                    self._finish(request)
        self._check()

    # The scheduler

    def _chunk(self, request: Request, computed: int) -> int:
        return min(request.num_tokens - computed, self.random.choice((7, 32, 50, 200)))

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
            self._know(request, end)
            scheduled[request] = tokens
        return scheduled

    def _admit(self, new: list[Request], scheduled: dict[Request, int]) -> None:
        while self.waiting:
            request = self.waiting[0]
            hashes = request.block_hashes
            most = (request.num_tokens - 1) // BLOCK
            own: list[int] = []
            for key in hashes[:most]:
                if key not in self.own:
                    break
                own.append(self.own[key])
            promised = self.side.matched_tokens(request, len(own) * BLOCK)
            assert promised is not None
            computed = len(own) * BLOCK + promised
            assert computed < request.num_tokens
            tokens = self._chunk(request, computed)
            need = -(-(computed + tokens) // BLOCK) - len(own)
            if need > len([block for block in self.free if block not in own]):
                break
            for block in own:
                self.users[block] += 1
                if block in self.free:
                    self.free.remove(block)
            request.blocks = own + self._allocate(need)
            self.side.admitted(request, (request.blocks,), promised)
            request.num_computed_tokens = computed
            self._know(request, computed + tokens)
            self.running.append(self.waiting.pop(0))
            new.append(request)
            scheduled[request] = tokens

    def _allocate(self, count: int) -> list[int]:
        blocks, self.free = self.free[:count], self.free[count:]
        self.given.update(blocks)
        for store in self.stores:
            if not self.given.isdisjoint(store.what.blocks):
                self._read(store)
        for block in blocks:
            self.users[block] = 1
            for rank in RANKS:
                self.kv[rank][block] = None
        self.own = {key: block for key, block in self.own.items() if block not in blocks}
        return blocks

    def _know(self, request: Request, end: int) -> None:
        """As vLLM does, before they are computed: others of this step find them."""
        if request.stale:
            return
        for key, block in zip(request.block_hashes[: end // BLOCK], request.blocks, strict=False):
            self.keys.add(key)
            self.own.setdefault(key, block)

    def _release(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.blocks = []
        request.num_computed_tokens = 0
        request.stale = False

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.insert(0, request)
        self.preempted.add(request)

    def _finish(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        self.preempted.discard(request)
        self.side.finished(request)
        self._release(request)

    def _take_back(self, bad: set[int], before: dict[Request, int]) -> set[Request]:
        affected = set()
        for request in self.running:
            for at in range(-(-before[request] // BLOCK)):
                if request.blocks[at] in bad:
                    request.num_computed_tokens = at * BLOCK
                    affected.add(request)
                    break
        self.own = {
            key: block
            for key, block in self.own.items()
            if all(self._is(self.kv[rank][block], key) for rank in RANKS)
        }
        return affected

    # The workers

    def _work(
        self,
        loads: list[Transfer],
        stores: list[Transfer],
        scheduled: dict[Request, int],
        before: dict[Request, int],
    ) -> tuple[set[int], Acks]:
        bad: set[int] = set()
        acks = Acks()
        for rank in RANKS:
            kv, slots = self.kv[rank], self.slots[rank]
            rank_bad: set[int] = set()
            rank_acks = Acks()
            for load in loads:
                fails = self.random.random() < 0.15
                for block, slot in zip(load.blocks, load.slots, strict=True):
                    kv[block] = None if fails else slots[slot]
                if fails:
                    rank_bad.update(load.blocks)
                    rank_acks.ranks[load.job] = 1
                    rank_acks.failed.add(load.job)
                else:
                    read = {slot: slots[slot] for slot in load.slots}
                    self.loads.append(Copying(rank, load, read))
            self._forward(kv, rank_bad, scheduled, before)
            for store in stores:
                fails = bool(rank_bad) or self.random.random() < 0.05
                if fails:
                    for slot in store.slots:
                        slots[slot] = None
                    rank_acks.ranks[store.job] = 1
                    rank_acks.failed.add(store.job)
                else:
                    self.stores.append(Copying(rank, store))
            bad |= rank_bad
            acks.aggregate(rank_acks)
        for over in self._ended(self.loads, acks):
            slots = self.slots[over.rank]
            assert all(slots[slot] == content for slot, content in over.read.items())
        for over in self._ended(self.stores, acks):
            self._read(over)
            for slot, content in over.read.items():
                self.slots[over.rank][slot] = content
        return bad, acks

    def _read(self, store: Copying) -> None:
        """A store reads its blocks, if it has not yet."""
        for block, slot in zip(store.what.blocks, store.what.slots, strict=True):
            store.read.setdefault(slot, self.kv[store.rank][block])

    def _ended(self, under_way: list[Copying], acks: Acks) -> list[Copying]:
        """Those that end with this step."""
        ended = [each for each in under_way if not self.late or self.random.random() < 0.4]
        for each in ended:
            under_way.remove(each)
            acks.aggregate(Acks({each.what.job: 1}))
        return ended

    def _forward(
        self,
        kv: list[Content],
        bad: set[int],
        scheduled: dict[Request, int],
        before: dict[Request, int],
    ) -> None:
        for request in scheduled:
            hashes = request.block_hashes
            first = before[request] // BLOCK
            rests_on = list(zip(hashes[:first], request.blocks, strict=False))
            if not bad.intersection(request.blocks[:first]):
                # The engine computes on what it believes to have: it had better have it.
                for key, block in rests_on:
                    content = kv[block]
                    assert content is not None, (request, key)
                    assert content[0] == key
            for at in range(first, min(request.num_computed_tokens, request.num_tokens) // BLOCK):
                earlier = [kv[block] for block in request.blocks[:at]]
                sound = [content[1] for content in earlier if content is not None]
                whole = len(sound) == len(earlier)
                since = min(sound, default=self.resets)
                kv[request.blocks[at]] = (hashes[at], since) if whole else None

    # What must hold

    def _is(self, content: Content, key: bytes) -> bool:
        return content is not None and content[0] == key

    def _check(self) -> None:
        stats = self.front.stats()
        assert stats.used_blocks <= stats.capacity_blocks
        for key in self.keys:
            lease = self.front.pin([key])
            for slot in lease.slots:
                for rank in RANKS:
                    assert self.slots[rank][slot] == (key, self.resets), (key, rank)
            lease.end()
        assert self.side.copying == bool(self.loads or self.stores)
        assert self.side._running.keys() <= {request.request_id for request in self.running} | {
            request.request_id for request in self.preempted
        }

    def end(self) -> None:
        """All are aborted."""
        for request in [*self.waiting, *self.running]:
            self._finish(request)
        while self.side.copying:  # as vLLM does
            self.step()
        side = self.side
        assert not any((side._promised, side._running, side._jobs, side._loads))
        assert self.front.stats().pinned_slots == 0
        side.close()
