"""The workers of the engine in miniature: what lies in every block and slot of two ranks.

A content is the key that it should have and the number of the reset after which all of it was
computed, None, or WRONG: a load failed, and it is what was there before or was computed from that.
A copy that goes on when its step has ended reads a block at the latest when it
is handed out again; a load that its step does not await has written nothing until it is over.
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
SHARED = 3  # leading blocks that all prompts of a family have in common
RANKS = (0, 1)

WRONG = (b"", -1)

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
    partly: tuple[int, int] = (-1, 0)  # the block that it computes in parts, resets before that
    gone: bool = False  # aborted, and its blocks are still being loaded
    wrong: bool = False  # what it computes rests on blocks that were not loaded
    placeholders: int = 0  # tokens that are sampled and not known yet
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
        """Of its block number ``n``, also before all tokens of that are known."""
        return f"{self.family}{self.request_id[-1] if n >= SHARED else ''}/{n}".encode()


@dataclass(eq=False)
class Copying:
    """A copy that was begun on one rank; `read` is the content of what it has read, by slot."""

    rank: int
    what: Transfer
    read: dict[int, Content] = field(default_factory=dict)


@dataclass
class Told:
    """What the workers say of a step: `received` names a request once for every rank."""

    bad: set[int] = field(default_factory=set)
    acks: Acks = field(default_factory=Acks)
    received: list[str] = field(default_factory=list)


class Workers:
    """All ranks. `late`: their copies go on when the step has ended.

    `reports_first`: a step is reported before its stores begin, as vLLM does where it drafts
    tokens; these workers then do not know any more that loads of the step failed.
    """

    def __init__(self, random: Random, *, reports_first: bool = False) -> None:
        self.random = random
        self.reports_first = reports_first
        self.unreported = Acks()
        self.late = random.random() < 0.5
        self.resets = 0
        self.kv: list[list[Content]] = [[None] * BLOCKS for _ in RANKS]
        self.slots: list[list[Content]] = [[None] * SLOTS for _ in RANKS]
        self.stores: list[Copying] = []
        self.loads: list[Copying] = []

    def hand_out(self, blocks: Collection[int]) -> None:
        """Blocks are given to somebody: who reads them has done so, and what was in them is not."""
        for store in self.stores:
            if not set(blocks).isdisjoint(store.what.blocks):
                self._read(store)
        for block in blocks:
            for rank in RANKS:
                self.kv[rank][block] = None

    def work(self, step: Step, scheduled: Collection[Request], before: dict[Request, int]) -> Told:
        told = Told(acks=Acks(step=step.number))
        told.acks.aggregate(self.unreported)
        self.unreported = Acks()
        written = [block for load in step.loads for block in load.blocks]
        assert len(set(written)) == len(written)
        for rank in RANKS:
            bad: set[int] = set()
            for load in step.loads:
                if self._begin(rank, load):
                    continue
                bad.update(load.blocks)
                told.acks.aggregate(Acks({load.job: 1}, {load.job}))
                if load.awaited_by is not None:
                    told.received.append(load.awaited_by)
            self._forward(self.kv[rank], scheduled, before)
            if not self.reports_first:
                self._begin_stores(rank, step, told.acks, fail=bool(bad))
            told.bad |= bad
        for over in self._ended(self.loads, told):
            slots = self.slots[over.rank]
            assert all(slots[slot] == content for slot, content in over.read.items())
            if over.what.awaited_by is not None:
                for block, slot in zip(over.what.blocks, over.what.slots, strict=True):
                    self.kv[over.rank][block] = slots[slot]
                told.received.append(over.what.awaited_by)
        for over in self._ended(self.stores, told):
            self._read(over)
            for slot, content in over.read.items():
                self.slots[over.rank][slot] = content
        for rank in RANKS if self.reports_first else ():
            self._begin_stores(rank, step, self.unreported, fail=False)
        return told

    def _begin(self, rank: int, load: Transfer) -> bool:
        """Begin a load; a step that awaits it finds all. Whether it could be."""
        fails, slots = self.random.random() < 0.15, self.slots[rank]
        for block, slot in zip(load.blocks, load.slots, strict=True):
            there = slots[slot] if load.awaited_by is None else None
            self.kv[rank][block] = WRONG if fails else there
        if not fails:
            self.loads.append(Copying(rank, load, {slot: slots[slot] for slot in load.slots}))
        return not fails

    def _begin_stores(self, rank: int, step: Step, acks: Acks, *, fail: bool) -> None:
        for store in step.stores:
            if fail or self.random.random() < 0.05:
                for slot in store.slots:
                    self.slots[rank][slot] = None
                acks.aggregate(Acks({store.job: 1}, {store.job}))
            else:
                self.stores.append(Copying(rank, store))

    def _read(self, store: Copying) -> None:
        """A store reads its blocks, if it has not yet."""
        for block, slot in zip(store.what.blocks, store.what.slots, strict=True):
            store.read.setdefault(slot, self.kv[store.rank][block])

    def _ended(self, under_way: list[Copying], told: Told) -> list[Copying]:
        """Those that end with this step."""
        ended = [each for each in under_way if not self.late or self.random.random() < 0.4]
        for each in ended:
            under_way.remove(each)
            told.acks.aggregate(Acks({each.what.job: 1}))
        return ended

    def _forward(
        self, kv: list[Content], scheduled: Collection[Request], before: dict[Request, int]
    ) -> None:
        for request in scheduled:
            first = before[request] // BLOCK
            for at, block in enumerate(request.blocks[:first]):
                # The engine computes on what it believes to have: it had better have it.
                content = kv[block]
                assert content is not None, (request, at)
                assert content[0] == request.key(at) or content == WRONG
                request.wrong |= content == WRONG
            for at in range(first, request.num_computed_tokens // BLOCK):
                earlier = [kv[block] for block in request.blocks[:at]]
                sound = [content[1] for content in earlier if content is not None]
                assert len(sound) == len(earlier)
                since = min(sound, default=self.resets)
                if request.partly[0] == at:
                    since = min(since, request.partly[1])
                kv[request.blocks[at]] = WRONG if request.wrong else (request.key(at), since)
            last = request.num_computed_tokens // BLOCK
            if request.num_computed_tokens % BLOCK and request.partly[0] != last:
                request.partly = (last, self.resets)
