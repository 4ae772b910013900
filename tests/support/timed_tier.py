"""A lower tier of which the calls take time on a test's clock."""

from collections.abc import Sequence

from tests.support.failing_parts import FaultyTier
from tests.support.manual_clock import ManualClock


class TimedTier(FaultyTier):
    """A lookup takes ``lookup_s`` and a load ``load_s`` per block, on the test's clock."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock
        self.lookup_s = self.load_s = 0.0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._clock.advance(self.lookup_s)
        return super().contains(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self._clock.advance(self.load_s * len(keys))
        return super().load(keys, into)
