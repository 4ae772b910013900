"""A lower tier and a policy that fail on command, for tests of the code that calls them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvcache.eviction import Lru, Take
from kvcache.keys import Branch
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.dram import DramTier
from tests.support.wrong_results import EXCEPTIONS, WRONG_RESULTS

COMMON_FAULTS = ["raise", "hole", "short", "count", "lie", "decline"]
RARE_FAULTS = [*EXCEPTIONS, *WRONG_RESULTS]
FAULTS = [*COMMON_FAULTS, *RARE_FAULTS]
"""The faults of a ``FaultyTier``."""


class DictTier(Tier):
    """A tier with its blocks in a dictionary.

    Attributes:
        held: the blocks by key.
    """

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = []
        for key, buffer in zip(keys, into, strict=True):
            block = self.held.get(key, b"")
            buffer[: len(block)] = block
            written.append(len(block))
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        for key, block in zip(keys, blocks, strict=True):
            self.held[key] = bytes(block)
        return [True] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        pass


class FaultyTier(Tier):
    """A tier around another one, which fails on command.

    A call with a wrong result does its work nonetheless. The inner tier stays open.

    Args:
        inner: keeps the blocks; ``None`` is a dictionary.

    Attributes:
        held: the blocks by key, if a dictionary keeps them.
        fault: the fault of the next calls, one of ``FAULTS``; empty for none.
        gate: while it is cleared, calls hang.
        waiting: released by each call that hangs.
        failed: how many calls a caller must treat as failures.
        requested_blocks: how many blocks loads asked for.
        calls: the names of the methods called.
        read: the keys that were loaded.
    """

    def __init__(self, inner: Tier | None = None) -> None:
        blocks = DictTier()
        self.held = blocks.held
        self._inner = inner or blocks
        self.fault = ""
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)
        self.failed = 0
        self.requested_blocks = 0
        self.calls: list[str] = []
        self.read: list[bytes] = []
        self.closed = False

    def _begin_call(self, method: str) -> None:
        self.calls.append(method)
        if not self.gate.is_set():
            self.waiting.release()
            self.gate.wait()
        if self.fault == "raise":
            self.failed += 1
            raise OSError(f"{method} fails")
        if self.fault in EXCEPTIONS:
            self.failed += 1
            error = EXCEPTIONS[self.fault]()
            raise error

    def _result(self, correct: list[Any], fault: str) -> list[Any]:
        if fault in WRONG_RESULTS:
            self.failed += 1
            wrong: list[Any] = WRONG_RESULTS[fault](len(correct))
            return wrong
        return correct

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        fault = self.fault
        self._begin_call("contains")
        if fault == "lie":
            return [True] * len(keys)
        if fault == "count":
            self.failed += 1
            return [True] * (len(keys) + 1)
        return self._result(self._inner.contains(keys), fault)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        fault = self.fault
        self.requested_blocks += len(keys)
        self._begin_call("load")
        self.read += keys
        buffers = [memoryview(bytearray(len(each))) for each in into] if fault == "short" else into
        served = [at for at in range(len(keys)) if fault != "hole" or at % 3 != 1]
        found = self._inner.load([keys[at] for at in served], [buffers[at] for at in served])
        written = [0] * len(keys)
        for at, nbytes in zip(served, found, strict=True):
            written[at] = nbytes
            if fault == "short":
                written[at] = nbytes // 2
                into[at][: nbytes // 2] = buffers[at][: nbytes // 2]
        if fault == "count":
            self.failed += 1
            return written[:-1]
        return self._result(written, fault)

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        fault = self.fault
        self._begin_call("store")
        if fault == "decline":
            return [False] * len(keys)
        return self._result(self._inner.store(keys, blocks, parent), fault)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._begin_call("remove")
        self._inner.remove(keys)

    def resolve(self, namespace: bytes, about: str) -> bytes:
        return self._inner.resolve(namespace, about)

    def forget(self, namespace: bytes) -> None:
        self._inner.forget(namespace)

    def usage(self) -> TierUsage:
        return self._inner.usage()

    def close(self) -> None:
        self.closed = True


class StoringTier(FaultyTier):
    """A faulty tier that passes the segments of a store to the inner tier in one call."""

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        fault = self.fault
        self._begin_call("store")
        if fault == "decline":
            return [False] * len(blocks)
        return self._result(self._inner.store_branches(branches, blocks), fault)


class FaultyPolicy(Lru):
    """LRU that calls ``fault`` in place of the method named ``method``."""

    method = ""
    fault: Callable[..., Any]

    def _call(self, method: str, *arguments: Any) -> Any:
        if method == self.method:
            return self.fault(*arguments)
        return getattr(Lru, method)(self, *arguments)

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        self._call("access", chain, held, now)

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return self._call("admit", keys, parent, now)  # type: ignore[no-any-return]

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._call("add", keys, parent, now)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._call("remove", keys)

    def evict(self, count: int, take: Take) -> None:
        self._call("evict", count, take)


def replace_policy_method(tier: DramTier, method: str, fault: Callable[..., Any]) -> None:
    """Replace the tier's policy by LRU that calls ``fault`` in place of ``method``."""
    policy = FaultyPolicy(tier.slab.slots)
    with tier.lock:
        for segment in tier.index.segments.by_first_slot.values():
            if segment.ready:
                policy.add(segment.keys, segment.parent, 0.0)
        policy.method, policy.fault = method, fault
        tier.index.policy = policy
