"""Hazards for tests of the learned policy that must not learn."""

from kvcache.eviction.gittins.hazards import Hazards


class FixedHazards(Hazards):
    """Tables of worth that never change.

    Args:
        tables: worth by class, at the start of each octave and at the end of the last one.
    """

    def __init__(self, tables: list[list[float]]) -> None:
        super().__init__(1)
        self.tables = tables

    def end_epoch(self, seconds: float, lookups: int, blocks: int) -> bool:
        return False
