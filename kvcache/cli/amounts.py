"""Capacities as people write them: in blocks, "10000", or in bytes, "64GiB"."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from kvcache.sizes import format_size, parse_size
from kvcache.slab import slot_nbytes_for


class Amount(NamedTuple):
    """One capacity: a number of blocks, or of bytes; the other is 0."""

    text: str
    blocks: int = 0
    nbytes: int = 0


def amounts(text: str) -> list[Amount]:
    """Capacities with commas between; for argparse."""
    return [_amount(each.strip()) for each in text.split(",")]


def _amount(text: str) -> Amount:
    if text.isdecimal() and int(text):
        return Amount(text, blocks=int(text))
    try:
        if text.isdecimal():
            raise ValueError("it must hold a block at least")
        return Amount(text, nbytes=parse_size(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r}: {error}; a number of blocks ("10000") or a size ("64GiB")'
        ) from None


def bytes_each(text: str) -> int:
    """What a block or a token takes; for argparse."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


class BlockSize:
    """What a block takes in L1, whose slots are whole pages of memory; ``nbytes`` if known."""

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = nbytes

    def blocks(self, amount: Amount) -> int:
        """How many blocks are in it. Raises ValueError if none is."""
        if amount.blocks:
            return amount.blocks
        assert self.nbytes is not None
        count = amount.nbytes // slot_nbytes_for(self.nbytes)
        if not count:
            takes = format_size(self.nbytes)
            raise ValueError(f"a capacity of {amount.text} holds no block, which takes {takes}")
        return count

    def shown(self, blocks: int) -> str:
        """``blocks`` for people: in bytes, if known."""
        return f"{blocks:,}" if self.nbytes is None else format_size(blocks * self.nbytes)


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number of ``least`` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; a whole number, at least {least}")
        return int(text)

    return parse
