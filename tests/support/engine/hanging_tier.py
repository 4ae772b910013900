"""A tier that hangs when it is read, and a scenario for an engine that has it."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any, ClassVar

from tests.support.engine import several_groups
from tests.support.engine.engine import Engine
from tests.support.engine.slow_tier import SlowTier

END_S = 60.0


class HangingTier(SlowTier):
    """Keeps blocks in a dictionary. Loads hang until `released` is set."""

    released: ClassVar[Event] = Event()

    def __init__(self) -> None:
        super().__init__(seconds=0.0)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self.released.wait(END_S)
        return super().load(keys, into)

    def close(self) -> None:
        self.released.set()


def repeat_prompts_of_a_hanging_tier(engine: Engine) -> dict[str, Any]:
    """Repeat prompts that only the lower tier holds: while it hangs, and after it hangs no more."""
    stack = engine.stack
    assert stack.flush(END_S)
    stack.front.clear()
    answers = several_groups.repeat_prompts(engine)
    HangingTier.released.set()
    assert stack.flush(END_S)
    again = several_groups.repeat_prompts(engine)
    return {"answers": answers, "again": again, "ends": [engine.open_state()]}
