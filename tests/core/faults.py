"""A lower tier that fails when it is told to, for tests of what is above it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvcache.tier import Tier


class Faulty(Tier):
    """Blocks in a dictionary. ``fault``: what the next calls do wrong; ``gate`` makes them hang."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.fault = ""
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)  # released by each call that hangs
        self.calls: list[str] = []
        self.read: list[bytes] = []
        self.closed = False

    def _called(self, verb: str) -> None:
        self.calls.append(verb)
        if not self.gate.is_set():
            self.waiting.release()
            self.gate.wait()
        if self.fault == "raise":
            raise OSError(f"{verb} fails")

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._called("contains")
        if self.fault == "lie":
            return [True] * len(keys)
        if self.fault == "count":
            return [True] * (len(keys) + 1)
        return [key in self.held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self._called("load")
        written = []
        for at, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            self.read.append(key)
            block = self.held.get(key, b"")
            if self.fault == "hole" and at % 3 == 1:
                block = b""
            if self.fault == "short":
                block = block[: len(block) // 2]
            buffer[: len(block)] = block
            written.append(len(block))
        return written[:-1] if self.fault == "count" else written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], after: bytes | None = None
    ) -> list[bool]:
        self._called("store")
        if self.fault == "decline":
            return [False] * len(keys)
        for key, block in zip(keys, blocks, strict=True):
            self.held[key] = bytes(block)
        return [True] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._called("remove")
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        self.closed = True
