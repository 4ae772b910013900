"""A tier that takes its time, and an act for an engine that has it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

from kvcache.tier import Tier
from tests.support.engine.engine import Engine
from tests.support.engine.lower_tier import PROMPTS


class SlowTier(Tier):
    """Blocks in a dictionary, ``seconds`` to read each: a tiny model computes one in less."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._held: dict[bytes, bytes] = {}

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self._held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        time.sleep(self._seconds * len(keys))
        blocks = [self._held.get(key, b"") for key in keys]
        for buffer, block in zip(into, blocks, strict=True):
            buffer[: len(block)] = block
        return list(map(len, blocks))

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self._held.update((key, bytes(block)) for key, block in zip(keys, blocks, strict=True))
        return [True] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._held.pop(key, None)

    def close(self) -> None:
        pass


def ask_below(engine: Engine) -> dict[str, Any]:
    """The same prompts three times; from the second on the tier below has them, and nobody else."""
    answers, stack = [], engine.side.stack
    begun: list[Future[Any]] = []
    submit = stack.lower.submit

    def submitted(*call: Any) -> Future[Any]:
        begun.append(submit(*call))
        return begun[-1]

    stack.lower.submit = submitted
    for _ in range(3):
        for asked in PROMPTS:
            assert stack.flush(60)
            stack.front.clear()
            engine.evict_own()
            answers.append(engine.ask(asked, tokens=12))
            wait(begun, 60)  # for what the request did not wait for
    [lower] = stack.stats().lower
    return {
        "tokens": [answer["tokens"] for answer in answers],
        "cached": [answer["cached"] for answer in answers],
        "loaded": lower.loaded_blocks,
        "skipped": lower.skipped_blocks,
        "computing": stack.lower.compute_model.pessimistic(1),
        "pinned": stack.stats().pinned_slots,
    }
