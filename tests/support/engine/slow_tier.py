"""A tier slower than computing, and a scenario for an engine that has it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

from kvcache.tier import Tier
from tests.support.engine.engine import Engine
from tests.support.engine.lower_tier import PROMPTS


class SlowTier(Tier):
    """Keeps blocks in a dictionary, and takes ``seconds`` to read each."""

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


def repeat_prompts_of_a_slow_tier(engine: Engine) -> dict[str, Any]:
    """Complete the same prompts three times; after the first, only the lower tier holds them."""
    answers, stack = [], engine.stack
    loads: list[Future[Any]] = []
    submit = stack.lower.submit

    def recorded_submit(*call: Any) -> Future[Any]:
        loads.append(submit(*call))
        return loads[-1]

    stack.lower.submit = recorded_submit
    for _ in range(3):
        for asked in PROMPTS:
            assert stack.flush(60)
            stack.front.clear()
            engine.reset_own_cache()
            answers.append(engine.complete(asked, tokens=12))
            wait(loads, 60)  # also for the loads that the request did not wait for
    [lower] = stack.stats().lower
    return {
        "tokens": [answer["tokens"] for answer in answers],
        "cached": [answer["cached"] for answer in answers],
        "loaded": lower.loaded_blocks,
        "skipped": lower.skipped_blocks,
        "computing": stack.lower.compute_model.pessimistic(1),
        "pinned": stack.stats().pinned_slots,
    }
