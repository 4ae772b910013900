"""Replicas: engines of one model that one command starts on one host, for data parallelism.

All replicas open the same profile. A tier that replicas cannot share divides its options by their
number.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replica:
    """One of the replicas on this host.

    Attributes:
        index: the number of this replica, from 0.
        count: how many replicas there are.

    Raises:
        ValueError: if ``index`` is not below ``count``.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"replica is ({self.index}, {self.count}); it takes the number of this replica, "
                "from 0, and the number of replicas"
            )


ALONE = Replica()
"""The replica of an engine without data parallelism."""
