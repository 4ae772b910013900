"""The copies of a simulated worker: each may fail, or take several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks, Step, Transfer
from tests.support.played_memory import RankMemory


@dataclass(frozen=True)
class Copying:
    """How the copies of all ranks run.

    Attributes:
        ending: share of the copies in progress that end with each step. Below 1, copies are
            asynchronous.
        failing: share of the copies that fail.
        reports_first: a step is reported before its stores start, as vLLM does if it drafts tokens.
    """

    ending: float = 1.0
    failing: float = 0.0
    reports_first: bool = False

    @property
    def is_async(self) -> bool:
        return self.ending < 1


@dataclass(eq=False)
class CopyInProgress:
    """A copy of one rank. `read`: the bytes that it has read, by block or by slot."""

    operation: Literal["load", "store"]
    transfer: Transfer
    fails: bool
    outdated: bool = False  # a reset has come since it started
    read: list[bytes] = field(default_factory=list)


class RankCopies:
    """The copies of one rank.

    Args:
        memory: of the rank.
        slot: returns the bytes of a slot of L1.
        random: chooses which copies fail and when each ends.
        copying: how copies run.
        by_block: a failed load is reported by blocks, not by request.
        waits: the next step waits until stores have read their blocks.
    """

    def __init__(
        self,
        memory: RankMemory,
        slot: Callable[[int], Any],
        random: Random,
        copying: Copying,
        *,
        by_block: bool,
        waits: bool = False,
    ) -> None:
        self.memory = memory
        self._slot = slot
        self._random = random
        self._copying = copying
        self._by_block = by_block
        self._waits = waits
        self.in_progress: list[CopyInProgress] = []
        self._acks = Acks()
        self._received: set[str] = set()
        self._failed_requests: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_step = -1

    @property
    def is_idle(self) -> bool:
        return not (self.in_progress or self._acks.ranks)

    def reset(self) -> None:
        """Note that loads in progress bring blocks from before a reset."""
        for copy in self.in_progress:
            copy.outdated = True

    def fence(self, step: Step) -> None:
        """Have the stores that read a fresh block of this step read it now."""
        self._read_stores(set(step.fresh))

    def load(self, step: Step) -> None:
        """Start the loads of a step. A load for the step's own forward pass writes at once."""
        self._acks.step = step.number
        for transfer in step.loads:
            self._read_stores(set(transfer.blocks))
            copy = CopyInProgress("load", transfer, self._random.random() < self._copying.failing)
            copy.read = [bytes(self._slot(slot)) for slot in transfer.slots]
            if copy.fails and transfer.awaited_by is None:
                self._failed_step = step.number
            if transfer.awaited_by is None:
                self._write_load(step, copy)
            self.in_progress.append(copy)
            if copy.fails and (transfer.awaited_by is None or self._random.random() < 0.5):
                self._end(step, copy)

    def store(self, step: Step) -> None:
        """Start the stores of a step."""
        for transfer in step.stores:
            after_failed_load = step.number == self._failed_step
            fails = after_failed_load or self._random.random() < self._copying.failing / 2
            copy = CopyInProgress("store", transfer, fails)
            self.in_progress.append(copy)
            if fails:
                self._end(step, copy)
        if self._waits:
            for copy in self.in_progress:
                self._read_store(copy)

    def report(self, step: Step) -> tuple[set[str], set[str], set[int], Acks | None]:
        """Land copies, and return the requests that they end, the failed ones, blocks and acks."""
        for copy in self.in_progress[:]:
            if self._random.random() < self._copying.ending:
                self._end(step, copy)
        received, self._received = self._received, set()
        failed, self._failed_requests = self._failed_requests, set()
        blocks, self._failed_blocks = self._failed_blocks, set()
        acks, self._acks = self._acks, Acks()
        return received, failed, blocks, acks if acks.ranks or acks.step else None

    def _end(self, step: Step, copy: CopyInProgress) -> None:
        self.in_progress.remove(copy)
        transfer = copy.transfer
        if copy.operation == "store":
            self._write_store(step, copy)
        else:
            slots = [bytes(self._slot(slot)) for slot in transfer.slots]
            assert copy.outdated or slots == copy.read, "a slot changed while it was loaded"
            if transfer.awaited_by is not None:
                self._write_load(step, copy)
                self._received.add(transfer.awaited_by)
            if copy.fails and self._by_block:
                self._failed_blocks.update(transfer.blocks)
            elif copy.fails and transfer.awaited_by is not None:
                self._failed_requests.add(transfer.awaited_by)
        failed = {transfer.job} if copy.fails else set[int]()
        self._acks.aggregate(Acks({transfer.job: 1}, failed))

    def _entries(self, step: Step, transfer: Transfer) -> Iterator[tuple[int, int, Any]]:
        """Yield for each entry its position, its block, and the place of this rank's bytes."""
        assert sum(count for _, count in transfer.pieces) == len(transfer.blocks)
        at = 0
        for number, count in transfer.pieces:
            place = step.memory.pieces[number].ranks.get(self.memory.rank)
            for position in range(at, at + count):
                if place is not None:
                    yield position, transfer.blocks[position], place
            at += count

    def _write_load(self, step: Step, copy: CopyInProgress) -> None:
        for position, block, place in self._entries(step, copy.transfer):
            if copy.fails or copy.outdated:
                self.memory.spoil(block, unsound=copy.outdated or self._by_block)
                continue
            data = copy.read[position][place.offset : place.offset + place.end - place.begin]
            self.memory.bytes_of(block)[place.begin : place.end] = memoryview(data)

    def _read_stores(self, blocks: set[int]) -> None:
        for copy in self.in_progress:
            if not blocks.isdisjoint(copy.transfer.blocks):
                self._read_store(copy)

    def _read_store(self, copy: CopyInProgress) -> None:
        if copy.operation == "store" and not copy.read:
            copy.read = [bytes(self.memory.bytes_of(block)) for block in copy.transfer.blocks]

    def _write_store(self, step: Step, copy: CopyInProgress) -> None:
        self._read_store(copy)
        for position, _, place in self._entries(step, copy.transfer):
            if not place.stores:
                continue
            data = copy.read[position][place.begin : place.end]
            if copy.fails:
                data = b"\xee" * len(data)
            view = self._slot(copy.transfer.slots[position])
            view[place.offset : place.offset + len(data)] = data
