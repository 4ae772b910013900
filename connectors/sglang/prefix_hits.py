"""How many leading pages of a prompt several host pools can restore together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

ALL_PAGES: Final = "all_pages"
TRAILING_PAGES: Final = "trailing_pages"


def count_leading(held: Sequence[bool]) -> int:
    """Return how many leading values are true."""
    return next((at for at, each in enumerate(held) if not each), len(held))


def restorable_prefixes(held: Sequence[bool], policy: str, trailing: int) -> list[int] | None:
    """Return the lengths of prefixes for which one pool holds what it has to.

    Args:
        held: for each page whether the pool holds it.
        policy: ``ALL_PAGES`` if the pool needs every page of a prefix (an indexer);
            ``TRAILING_PAGES`` if it needs the last ``trailing`` ones (windows, states of Mamba).
        trailing: how many pages a prefix needs at its end; all of a shorter prefix.

    Returns:
        lengths above 0, ascending; ``None`` for a policy that does not restrict the prefix.
    """
    if policy == ALL_PAGES:
        return list(range(1, count_leading(held) + 1))
    if policy != TRAILING_PAGES:
        return None
    lengths, run = [], 0
    for end, each in enumerate(held, 1):
        run = run + 1 if each else 0
        if run >= min(end, max(1, trailing)):
            lengths.append(end)
    return lengths
