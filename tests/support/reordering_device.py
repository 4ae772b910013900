"""A device of the worst kind: what no mark forbids it does in any order, a page at a time."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from kvcache.connectors.transfer.base import Integers


@dataclass(eq=False)
class ReorderedEvent:
    device: ReorderingDevice
    at: float = float("nan")  # the device's time when it was passed

    def done(self) -> bool:
        self.device.work(self.device.random.randrange(4))
        return self.at == self.at

    def wait(self) -> None:
        while self.at != self.at:
            assert self.device.work(1), "it waits for ever"

    def seconds_since(self, earlier: ReorderedEvent) -> float:
        return self.at - earlier.at


@dataclass(eq=False)
class ReorderedStream:
    device: ReorderingDevice
    todo: deque[Callable[[], object] | ReorderedEvent] = field(
        default_factory=deque
    )  # a Mark: wait for it

    def record(self) -> ReorderedEvent:
        mark = ReorderedEvent(self.device)

        def passed() -> None:
            mark.at = float(self.device.time)

        self.todo.append(passed)
        return mark

    def wait_for(self, mark: ReorderedEvent) -> None:
        self.todo.append(mark)

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        for target, source, count in zip(
            targets.tolist(), sources.tolist(), nbytes.tolist(), strict=True
        ):
            if self.device.breaks:
                self.device.breaks -= 1
                if not self.device.breaks:
                    raise OSError("a copy that fails on purpose")
            self.todo.append(partial(ctypes.memmove, target, source, count))

    def ready(self) -> bool:
        while self.todo and isinstance(head := self.todo[0], ReorderedEvent):
            if head.at != head.at:
                return False
            self.todo.popleft()
        return bool(self.todo)


class ReorderingDevice:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.time = 0
        self.breaks = 0  # the copy of a page, counted from the next, that raises
        self.pinned: dict[int, int] = {}
        self.no_more = ""  # what is said to who wants more pinned
        self.current = ReorderedStream(self)  # that the engine computes on
        self._streams = [self.current]

    def engine_stream(self) -> ReorderedStream:
        return self.current

    def new_stream(self) -> ReorderedStream:
        self._streams.append(ReorderedStream(self))
        return self._streams[-1]

    def pin(self, address: int, nbytes: int) -> str:
        if not self.no_more:
            self.pinned[address] = nbytes
        return self.no_more

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def work(self, steps: int) -> bool:
        """Do so many things that may be done; whether there were as many."""
        for _ in range(steps):
            ready = [stream for stream in self._streams if stream.ready()]
            if not ready:
                return False
            self.time += 1
            step = self.random.choice(ready).todo.popleft()
            assert not isinstance(step, ReorderedEvent)
            step()
        return True

    def drain(self) -> None:
        while self.work(1):
            pass
