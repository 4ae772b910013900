"""The workers of the engine in miniature: what lies in every block and slot of two ranks.

A content is the key that it should have and the number of the reset after which all of it was
computed, or None. A copy that goes on when its step has ended reads a block at the latest when it
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
    gone: bool = False  # aborted, and its blocks are still being loaded
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


@dataclass
class Told:
    """What the workers say of a step: `received` names a request once for every rank."""

    bad: set[int] = field(default_factory=set)
    acks: Acks = field(default_factory=Acks)
    received: list[str] = field(default_factory=list)


class Workers:
    """All ranks. `late`: their copies go on when the step has ended."""

    def __init__(self, random: Random) -> None:
        self.random = random
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
        told = Told()
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
            self._forward(self.kv[rank], bad, scheduled, before)
            for store in step.stores:
                self._store(rank, store, told, fails=bool(bad) or self.random.random() < 0.05)
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
        return told

    def _begin(self, rank: int, load: Transfer) -> bool:
        """Begin a load; a step that awaits it finds all. Whether it could be."""
        fails, slots = self.random.random() < 0.15, self.slots[rank]
        for block, slot in zip(load.blocks, load.slots, strict=True):
            there = not fails and load.awaited_by is None
            self.kv[rank][block] = slots[slot] if there else None
        if not fails:
            self.loads.append(Copying(rank, load, {slot: slots[slot] for slot in load.slots}))
        return not fails

    def _store(self, rank: int, store: Transfer, told: Told, *, fails: bool) -> None:
        if not fails:
            self.stores.append(Copying(rank, store))
            return
        for slot in store.slots:
            self.slots[rank][slot] = None
        told.acks.aggregate(Acks({store.job: 1}, {store.job}))

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
        self,
        kv: list[Content],
        bad: set[int],
        scheduled: Collection[Request],
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
