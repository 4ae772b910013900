"""Replicas: engines of one model that one command starts on one host, as data parallelism does.

They have the same profile. A tier that must not be shared divides what its options give.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replica:
    """One of the ``count`` replicas on this host: the one of number ``index``, from 0.

    Raises ValueError when there is no such one.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"replica is ({self.index}, {self.count}); it takes which one this is, from 0, and "
                "how many there are"
            )


ALONE = Replica()
"""The only one, as engines are without data parallelism."""
