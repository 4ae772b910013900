"""Tiers without blocks, for profiles that tests load: only their constructors matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from kvcache.events import BlockEvents
from kvcache.sizes import Size
from kvcache.tier import FrontTier, Lease, Tier, TierStats

if TYPE_CHECKING:
    from pathlib import Path


class Lower(Tier):
    """A lower tier."""

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [False for _ in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        return [0 for _ in keys]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False for _ in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        pass

    def close(self) -> None:
        pass


class LowerWithNamespace(Lower):
    """A lower tier with options that are named like arguments of ``LowerTier``."""

    def __init__(self, *, namespace: str, breaker: int = 0, piece_nbytes: int = 0) -> None:
        self.arguments = (namespace, breaker, piece_nbytes)


class Front(FrontTier):
    """A front tier with an option of every type."""

    def __init__(
        self,
        *,
        block_nbytes: int,
        room: Size,
        count: int = 1,
        ratio: float = 0.5,
        fast: bool = False,
        path: str = "/",
        order: Literal["lru", "fifo", "s3fifo"] = "lru",
        level: Literal[1, 2] = 1,
        opener: Callable[[], object] = object,
        clock: Callable[[], float] = float,
    ) -> None:
        if count == 13:
            raise ValueError("count is 13; unlucky")
        self.block_nbytes = block_nbytes

    contains = Lower.contains
    load = Lower.load
    store = Lower.store
    remove = Lower.remove
    close = Lower.close

    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        return 0

    def mark_done(self, keys: Sequence[bytes]) -> None:
        pass

    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        pass

    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        raise NotImplementedError

    def pin(self, keys: Sequence[bytes]) -> Lease:
        raise NotImplementedError

    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        raise NotImplementedError

    def clear(self) -> None:
        pass

    def subscribe(self, events: BlockEvents) -> None:
        pass

    def stats(self) -> TierStats:
        raise NotImplementedError


class Unreadable(Front):
    """The annotation of its option is imported for type checkers only."""

    def __init__(self, *, block_nbytes: int, path: Path) -> None:
        self.block_nbytes = block_nbytes


class Unfinished(Tier):
    """Lacks two of the required methods."""

    contains = Lower.contains
    remove = Lower.remove
    close = Lower.close


NOT_A_CLASS = 3
