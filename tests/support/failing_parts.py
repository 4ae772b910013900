"""A lower tier and a policy that fail when they are told to, for tests of what calls them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvcache.eviction import Lru, Take
from kvcache.tier import Tier
from kvcache.tiers.dram import DramTier
from tests.support.odd_answers import RAISED, RETURNED

USUAL = ["raise", "hole", "short", "count", "lie", "decline"]
ODD = [*RAISED, *RETURNED]
FAULTS = [*USUAL, *ODD]
"""What a ``Faulty`` may do wrong."""


class Faulty(Tier):
    """Blocks in a dictionary. ``fault``: what the next calls do wrong; ``gate`` makes them hang.

    A call that answers nothing of use does its work nonetheless.
    """

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.fault = ""
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)  # released by each call that hangs
        self.failed = 0  # calls that a caller has to take for failures
        self.asked_blocks = 0  # of loads
        self.calls: list[str] = []
        self.read: list[bytes] = []
        self.closed = False

    def _called(self, verb: str) -> None:
        self.calls.append(verb)
        if not self.gate.is_set():
            self.waiting.release()
            self.gate.wait()
        if self.fault == "raise":
            self.failed += 1
            raise OSError(f"{verb} fails")
        if self.fault in RAISED:
            self.failed += 1
            error = RAISED[self.fault]()
            raise error

    def _answer(self, right: list[Any], fault: str) -> list[Any]:
        if fault in RETURNED:
            self.failed += 1
            odd: list[Any] = RETURNED[fault](len(right))
            return odd
        return right

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        fault = self.fault
        self._called("contains")
        if fault == "lie":
            return [True] * len(keys)
        if fault == "count":
            self.failed += 1
            return [True] * (len(keys) + 1)
        return self._answer([key in self.held for key in keys], fault)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        fault = self.fault
        self.asked_blocks += len(keys)
        self._called("load")
        written = []
        for at, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            self.read.append(key)
            block = self.held.get(key, b"")
            if fault == "hole" and at % 3 == 1:
                block = b""
            if fault == "short":
                block = block[: len(block) // 2]
            buffer[: len(block)] = block
            written.append(len(block))
        if fault == "count":
            self.failed += 1
            return written[:-1]
        return self._answer(written, fault)

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        fault = self.fault
        self._called("store")
        if fault == "decline":
            return [False] * len(keys)
        for key, block in zip(keys, blocks, strict=True):
            self.held[key] = bytes(block)
        return self._answer([True] * len(keys), fault)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._called("remove")
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        self.closed = True


class FaultyPolicy(Lru):
    """LRU until ``fault`` is called in place of the method ``verb``."""

    verb = ""
    fault: Callable[..., Any]

    def _may(self, verb: str, *arguments: Any) -> Any:
        if verb == self.verb:
            return self.fault(*arguments)
        return getattr(Lru, verb)(self, *arguments)

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        self._may("access", chain, held, now)

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return self._may("admit", keys, parent, now)  # type: ignore[no-any-return]

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._may("add", keys, parent, now)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._may("remove", keys)

    def evict(self, count: int, take: Take) -> None:
        self._may("evict", count, take)


def goes_wrong(tier: DramTier, verb: str, fault: Callable[..., Any]) -> None:
    """Have ``verb`` of the tier's policy be ``fault`` from now on."""
    policy = FaultyPolicy(tier.slab.slots)
    with tier._lock:
        for stretch in tier.index.segments.by_first_slot.values():
            if stretch.ready:
                Lru.add(policy, stretch.keys, stretch.parent, 0.0)
        policy.verb, policy.fault = verb, fault
        tier.index.policy = policy
