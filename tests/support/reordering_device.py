"""A device that does its queued work in any order that events allow, a page at a time."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from kvcache.connectors.transfer.base import Integers


@dataclass(eq=False)
class ReorderedEvent:
    device: ReorderingDevice
    at: float = float("nan")  # the device's time when it passed this event

    @property
    def passed(self) -> bool:
        return self.at == self.at

    def done(self) -> bool:
        self.device.work(self.device.random.randint(0, self.device.pace))
        return self.passed

    def wait(self) -> None:
        while not self.passed:
            assert self.device.work(1), "the event waits for ever"

    def seconds_since(self, earlier: ReorderedEvent) -> float:
        return self.at - earlier.at


@dataclass(eq=False)
class ReorderedStream:
    device: ReorderingDevice
    queue: deque[Callable[[], object] | ReorderedEvent] = field(default_factory=deque)
    """Work to do, and events to wait for."""
    background: bool = False
    share: float = 1.0  # of the device's work, relative to other streams that are ready

    def record(self) -> ReorderedEvent:
        event = ReorderedEvent(self.device)

        def pass_event() -> None:
            event.at = float(self.device.time)

        self.queue.append(pass_event)
        return event

    def wait_for(self, event: ReorderedEvent) -> None:
        self.queue.append(event)

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        for column in (targets, sources, nbytes):  # a driver reads the arrays in place
            assert column.flags.c_contiguous
            assert column.dtype == "int64"
        for target, source, count in zip(
            targets.tolist(), sources.tolist(), nbytes.tolist(), strict=True
        ):
            if self.device.copies_until_error:
                self.device.copies_until_error -= 1
                if not self.device.copies_until_error:
                    raise OSError("a copy that fails on purpose")
            self.queue.append(partial(ctypes.memmove, target, source, count))

    def ready(self) -> bool:
        """Whether the next work of the queue may be done now."""
        while self.queue and isinstance(head := self.queue[0], ReorderedEvent):
            if not head.passed:
                return False
            self.queue.popleft()
        return bool(self.queue)


class ReorderingDevice:
    """A device with any number of streams.

    Args:
        random: chooses the stream of the next piece of work.
        pace: the most pieces of work that it does each time an event is asked whether it is over.
        shares: those from which the share of each new stream is chosen.
    """

    pci_address = ""

    def __init__(self, random: Random, *, pace: int = 3, shares: Sequence[float] = (1.0,)) -> None:
        self.random = random
        self.pace = pace
        self._shares = shares
        self.time = 0
        self.copies_until_error = 0  # 1: the copy of the next page raises; 0: none does
        self.pinned: dict[int, int] = {}
        self.pin_error = ""  # what `pin` returns
        self.current = ReorderedStream(self)  # the stream on which the engine computes
        self._streams = [self.current]

    def engine_stream(self) -> ReorderedStream:
        return self.current

    def new_stream(self, *, background: bool = False) -> ReorderedStream:
        share = self.random.choice(self._shares)
        self._streams.append(ReorderedStream(self, background=background, share=share))
        return self._streams[-1]

    def pin(self, address: int, nbytes: int) -> str:
        if not self.pin_error:
            self.pinned[address] = nbytes
        return self.pin_error

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def work(self, steps: int) -> bool:
        """Do `steps` pieces of work. Returns False if events allow fewer."""
        for _ in range(steps):
            ready = [stream for stream in self._streams if stream.ready()]
            if not ready:
                return False
            self.time += 1
            [stream] = self.random.choices(ready, [stream.share for stream in ready])
            step = stream.queue.popleft()
            assert not isinstance(step, ReorderedEvent)
            step()
        return True

    def drain(self) -> None:
        """Do all queued work."""
        while self.work(1):
            pass
