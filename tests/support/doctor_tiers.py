"""Lower tiers for the tests of the doctor: two that work, and one for each fault."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from kvcache.tier import Tier


class DictTier(Tier):
    """Keeps blocks in a dictionary of this process."""

    blocks: ClassVar[dict[bytes, bytes]] = {}
    stored_keys: ClassVar[list[bytes]] = []
    closed: ClassVar[int] = 0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.blocks for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = []
        for key, buffer in zip(keys, into, strict=True):
            block = self.blocks.get(key, b"")
            buffer[: len(block)] = block
            written.append(len(block))
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.stored_keys.extend(keys)
        self.blocks.update(zip(keys, map(bytes, blocks), strict=True))
        return [True for _ in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.blocks.pop(key, None)

    def close(self) -> None:
        type(self).closed += 1


class FixedSizeTier(DictTier):
    """Is opened for blocks of one size."""

    opened_with: ClassVar[list[int]] = []

    def __init__(self, *, block_nbytes: int) -> None:
        self.opened_with.append(block_nbytes)


class UnopenableTier(DictTier):
    """Raises when it is opened."""

    def __init__(self) -> None:
        raise ConnectionError("connection refused")


class FullTier(DictTier):
    """Declines every block."""

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False for _ in keys]


class CorruptingTier(DictTier):
    """Changes a byte of each block."""

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(keys, into)
        into[0][5000] ^= 1
        return written


class UndeletingTier(DictTier):
    """Ignores ``remove``."""

    blocks: ClassVar[dict[bytes, bytes]] = {}

    def remove(self, keys: Sequence[bytes]) -> None:
        pass


class UnreadableTier(DictTier):
    """Raises when it is read."""

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        raise OSError("the line is cut")


class HangingTier(DictTier):
    """Answers no lookup until ``released`` is set."""

    released: ClassVar[threading.Event] = threading.Event()

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self.released.wait()
        return super().contains(keys)
