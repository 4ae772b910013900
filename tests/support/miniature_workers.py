"""The workers of the miniature engine: the content of every block and slot of two ranks.

A content is ``None``; or a key and the number of resets before the oldest token in it was
computed; or `WRONG`: a load failed, and the block has its earlier bytes, or was computed from such
a block.
An asynchronous store reads a block at the latest when the block is allocated again. An async load
writes nothing until it has ended.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks, Step, Transfer

BLOCK = 32
BLOCKS = 14
SLOTS = 9
SHARED = 3  # leading blocks that all prompts of a family share
RANKS = (0, 1)

WRONG = (b"", -1)

Content = tuple[bytes, int] | None


@dataclass(eq=False)
class Request:
    """What the connector reads of a request, and what the engine knows of it."""

    request_id: str
    family: int
    num_tokens: int
    ends_at: int
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    partial: tuple[int, int] = (-1, 0)  # a block that is computed in parts, and resets before it
    aborted: bool = False  # while its blocks are still being loaded
    wrong: bool = False  # what it computes depends on blocks that were not loaded
    placeholders: int = 0  # sampled tokens that are not known yet
    starts: int = 0  # how often it lost its blocks
    blocks: list[int] = field(default_factory=list)
    lora_request: None = None
    num_prompt_tokens: int = 1 << 30
    trace_headers: dict[str, str] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def block_hashes(self) -> list[bytes]:
        return [self.key(n) for n in range(self.num_tokens // BLOCK)]

    def key(self, n: int) -> bytes:
        """Return the key of block ``n``, also before all of its tokens are known."""
        return f"{self.family}{self.request_id[-1] if n >= SHARED else ''}/{n}".encode()


@dataclass(eq=False)
class CopyUnderWay:
    """A copy that was started on one rank; `read` has the content that it has read, by slot."""

    rank: int
    transfer: Transfer
    read: dict[int, Content] = field(default_factory=dict)


@dataclass
class WorkerReport:
    """What the workers report of a step: `received` has a request once for every rank."""

    failed_blocks: set[int] = field(default_factory=set)
    acks: Acks = field(default_factory=Acks)
    received: list[str] = field(default_factory=list)


class Workers:
    """All ranks.

    `async_copies`: copies go on when their step has ended. `reports_first`: a step is reported
    before its stores start, as vLLM does if it drafts tokens. A rank then does not fail the stores
    of a step with a failed load.
    """

    def __init__(self, random: Random, *, reports_first: bool = False) -> None:
        self.random = random
        self.reports_first = reports_first
        self.unreported = Acks()
        self.async_copies = random.random() < 0.5
        self.resets = 0
        self.kv: list[list[Content]] = [[None] * BLOCKS for _ in RANKS]
        self.slots: list[list[Content]] = [[None] * SLOTS for _ in RANKS]
        self.stores: list[CopyUnderWay] = []
        self.loads: list[CopyUnderWay] = []

    def allocate(self, blocks: Collection[int]) -> None:
        """Have stores read blocks that the engine allocates again, and empty those blocks."""
        for store in self.stores:
            if not set(blocks).isdisjoint(store.transfer.blocks):
                self._read(store)
        for block in blocks:
            for rank in RANKS:
                self.kv[rank][block] = None

    def work(
        self, step: Step, scheduled: Collection[Request], before: dict[Request, int]
    ) -> WorkerReport:
        report = WorkerReport(acks=Acks(step=step.number))
        report.acks.aggregate(self.unreported)
        self.unreported = Acks()
        written = [block for load in step.loads for block in load.blocks]
        assert len(set(written)) == len(written)
        for rank in RANKS:
            failed_blocks: set[int] = set()
            for load in step.loads:
                if self._start(rank, load):
                    continue
                failed_blocks.update(load.blocks)
                report.acks.aggregate(Acks({load.job: 1}, {load.job}))
                if load.awaited_by is not None:
                    report.received.append(load.awaited_by)
            self._forward(self.kv[rank], scheduled, before)
            if not self.reports_first:
                self._start_stores(rank, step, report.acks, fail=bool(failed_blocks))
            report.failed_blocks |= failed_blocks
        for copy in self._ended(self.loads, report):
            slots = self.slots[copy.rank]
            assert all(slots[slot] == content for slot, content in copy.read.items())
            if copy.transfer.awaited_by is not None:
                for block, slot in zip(copy.transfer.blocks, copy.transfer.slots, strict=True):
                    self.kv[copy.rank][block] = slots[slot]
                report.received.append(copy.transfer.awaited_by)
        for copy in self._ended(self.stores, report):
            self._read(copy)
            for slot, content in copy.read.items():
                self.slots[copy.rank][slot] = content
        for rank in RANKS if self.reports_first else ():
            self._start_stores(rank, step, self.unreported, fail=False)
        return report

    def _start(self, rank: int, load: Transfer) -> bool:
        """Start a load, and return whether it succeeded. An async load does not write yet."""
        fails, slots = self.random.random() < 0.15, self.slots[rank]
        for block, slot in zip(load.blocks, load.slots, strict=True):
            there = slots[slot] if load.awaited_by is None else None
            self.kv[rank][block] = WRONG if fails else there
        if not fails:
            self.loads.append(CopyUnderWay(rank, load, {slot: slots[slot] for slot in load.slots}))
        return not fails

    def _start_stores(self, rank: int, step: Step, acks: Acks, *, fail: bool) -> None:
        for store in step.stores:
            if fail or self.random.random() < 0.05:
                for slot in store.slots:
                    self.slots[rank][slot] = None
                acks.aggregate(Acks({store.job: 1}, {store.job}))
            else:
                self.stores.append(CopyUnderWay(rank, store))

    def _read(self, store: CopyUnderWay) -> None:
        """Have a store read its blocks, if it has not yet."""
        for block, slot in zip(store.transfer.blocks, store.transfer.slots, strict=True):
            store.read.setdefault(slot, self.kv[store.rank][block])

    def _ended(self, under_way: list[CopyUnderWay], report: WorkerReport) -> list[CopyUnderWay]:
        """Remove and return the copies that end with this step."""
        ended = [each for each in under_way if not self.async_copies or self.random.random() < 0.4]
        for each in ended:
            under_way.remove(each)
            report.acks.aggregate(Acks({each.transfer.job: 1}))
        return ended

    def _forward(
        self, kv: list[Content], scheduled: Collection[Request], before: dict[Request, int]
    ) -> None:
        for request in scheduled:
            first = before[request] // BLOCK
            for at, block in enumerate(request.blocks[:first]):
                # The engine computes from these blocks, so they must hold what it expects.
                content = kv[block]
                assert content is not None, (request, at)
                assert content[0] == request.key(at) or content == WRONG
                request.wrong |= content == WRONG
            for at in range(first, request.num_computed_tokens // BLOCK):
                earlier = [kv[block] for block in request.blocks[:at]]
                sound = [content[1] for content in earlier if content is not None]
                assert len(sound) == len(earlier)
                since = min(sound, default=self.resets)
                if request.partial[0] == at:
                    since = min(since, request.partial[1])
                kv[request.blocks[at]] = WRONG if request.wrong else (request.key(at), since)
            last = request.num_computed_tokens // BLOCK
            if request.num_computed_tokens % BLOCK and request.partial[0] != last:
                request.partial = (last, self.resets)
