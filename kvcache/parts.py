"""Cut blocks of several sizes into parts that fit slots of one size.

Blocks of different kept groups may differ in size, but all slots of L1 have one size. A block
therefore has one or several parts of equal size, and every part has a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PARTS = 64
"""The most parts of a block: each part is a key to look up, and an entry of the index."""


def choose_parts(sizes: Sequence[int], *, most_waste: float = 0.05) -> tuple[int, ...]:
    """Return the number of parts of a block of each group: the fewest that waste little.

    The slot has room for the largest part: `max(ceil(size / parts))` bytes. A group's parts occupy
    at most `1 + most_waste` times the bytes of its block. If no choice with at most `MAX_PARTS`
    parts in each group achieves that, the result is the choice that is best for the group that
    wastes most.

    Args:
        sizes: Bytes of a block of each group. A group of 0 bytes has one part.
        most_waste: The share of a block's bytes that its slots may waste.
    """
    best, least = tuple(1 for _ in sizes), float("inf")
    for slot in _slot_sizes(sizes):  # the largest slot first, so the fewest parts first
        parts = tuple(max(1, -(-size // slot)) for size in sizes)
        if max(parts) > MAX_PARTS:
            break
        waste = max(
            count * slot / size - 1 for count, size in zip(parts, sizes, strict=True) if size
        )
        if waste <= most_waste:
            return parts
        if waste < least:
            best, least = parts, waste
    return best


def _slot_sizes(sizes: Sequence[int]) -> list[int]:
    """Return the slot sizes that a part of some group fills, in descending order.

    Any other slot size wastes more than the next smaller one of these and needs as many parts.
    """
    filled = {-(-size // parts) for size in sizes if size for parts in range(1, MAX_PARTS + 1)}
    return sorted(filled, reverse=True)
