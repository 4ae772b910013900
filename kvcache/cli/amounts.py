"""Capacities of the command line: in blocks, "10000", or in bytes, "64GiB"."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from kvcache.sizes import format_size, parse_size
from kvcache.slab import slot_nbytes_for


class Amount(NamedTuple):
    """A capacity in blocks or in bytes; the other number is 0.

    Attributes:
        text: as the user wrote it.
        blocks: a number of blocks.
        nbytes: a number of bytes.
    """

    text: str
    blocks: int = 0
    nbytes: int = 0


def capacities(text: str) -> list[Amount]:
    """Parse capacities separated by commas; for argparse."""
    return [_amount(each.strip()) for each in text.split(",")]


def _amount(text: str) -> Amount:
    if text.isdecimal() and int(text):
        return Amount(text, blocks=int(text))
    try:
        if text.isdecimal():
            raise ValueError("it must be at least one block")
        return Amount(text, nbytes=parse_size(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r}: {error}; a number of blocks ("10000") or a size ("64GiB")'
        ) from None


def block_nbytes(text: str) -> int:
    """Parse the size of a block or a token; for argparse."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


class BlockSize:
    """The size of a block, and capacities in such blocks.

    Args:
        nbytes: bytes of a block; ``None`` if unknown. Its slot in L1 is a whole number of pages.
    """

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = nbytes

    def blocks(self, amount: Amount) -> int:
        """Return how many blocks fit into a capacity; raises ValueError if none does."""
        if amount.blocks:
            return amount.blocks
        assert self.nbytes is not None
        count = amount.nbytes // slot_nbytes_for(self.nbytes)
        if not count:
            size = format_size(self.nbytes)
            raise ValueError(f"a capacity of {amount.text} is less than one block ({size})")
        return count

    def format(self, blocks: int) -> str:
        """Return ``blocks`` as text: as a size if the size of a block is known, else a number."""
        return f"{blocks:,}" if self.nbytes is None else format_size(blocks * self.nbytes)


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number of ``least`` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; a whole number, at least {least}")
        return int(text)

    return parse
