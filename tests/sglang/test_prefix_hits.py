"""How many leading pages a pool can restore, by what it needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.connectors.sglang.prefix_hits import (
    ALL_PAGES,
    TRAILING_PAGES,
    count_leading,
    restorable_prefixes,
)


@pytest.mark.parametrize(("held", "count"), [([], 0), ([1, 1], 2), ([1, 0, 1], 1), ([0, 1], 0)])
def test_leading_pages_end_at_a_hole(held: list[bool], count: int) -> None:
    assert count_leading(held) == count


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 5))
def test_prefixes_are_those_with_every_page_that_the_policy_needs(
    held: list[bool], trailing: int
) -> None:
    lengths = range(1, len(held) + 1)
    window = max(1, trailing)
    assert restorable_prefixes(held, ALL_PAGES, trailing) == [n for n in lengths if all(held[:n])]
    assert restorable_prefixes(held, TRAILING_PAGES, trailing) == [
        n for n in lengths if all(held[max(0, n - window) : n])
    ]


def test_prefix_is_not_restricted_by_another_policy() -> None:
    assert restorable_prefixes([False], "block_groups", 1) is None
