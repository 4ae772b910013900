"""Tiers below L1 for the doctor to try: good ones, and each with one thing wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from kvcache.tier import Tier


class Kept(Tier):
    """Keeps blocks for as long as the process lasts."""

    held: ClassVar[dict[bytes, bytes]] = {}
    asked: ClassVar[list[bytes]] = []  # every key that was ever stored
    closed: ClassVar[int] = 0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = []
        for key, buffer in zip(keys, into, strict=True):
            block = self.held.get(key, b"")
            buffer[: len(block)] = block
            written.append(len(block))
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.asked.extend(keys)
        self.held.update(zip(keys, map(bytes, blocks), strict=True))
        return [True for _ in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        type(self).closed += 1


class Sized(Kept):
    """Is made for blocks of one size."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, *, block_nbytes: int) -> None:
        self.sizes.append(block_nbytes)


class Refusing(Kept):
    """Cannot be opened."""

    def __init__(self) -> None:
        raise ConnectionError("nobody there")


class Full(Kept):
    """Takes nothing."""

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False for _ in keys]


class Wrong(Kept):
    """Changes a byte of what it is given."""

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(keys, into)
        into[0][5000] ^= 1
        return written


class Sticky(Kept):
    """Does not forget."""

    held: ClassVar[dict[bytes, bytes]] = {}

    def remove(self, keys: Sequence[bytes]) -> None:
        pass


class Failing(Kept):
    """Fails when it is read."""

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        raise OSError("the line is cut")


class Hanging(Kept):
    """Answers only when it is let go."""

    let_go: ClassVar[threading.Event] = threading.Event()

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self.let_go.wait()
        return super().contains(keys)
