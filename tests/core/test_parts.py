"""Parts: as few as a brute force finds, with as little waste."""

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcache.parts import MAX_PARTS, choose_parts

PAGE = 64 << 10


def slot_nbytes(sizes: Sequence[int], parts: Sequence[int]) -> int:
    return max(-(-size // count) for size, count in zip(sizes, parts, strict=True))


def waste(sizes: Sequence[int], parts: Sequence[int]) -> float:
    """Return the share of its bytes that the group with the most waste wastes."""
    slot = slot_nbytes(sizes, parts)
    return max(
        count * slot / size - 1 for size, count in zip(sizes, parts, strict=True) if size > 0
    )


def fewest_parts(sizes: Sequence[int], most: int) -> int | None:
    """Try every choice with at most `most` parts in a group."""
    totals = [
        sum(parts)
        for parts in product(range(1, most + 1), repeat=len(sizes))
        if waste(sizes, parts) <= 0.05
    ]
    return min(totals, default=None)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((), ()),
        ((1,), (1,)),
        ((393_216,), (1,)),
        ((PAGE, PAGE), (1, 1)),
        ((PAGE, PAGE * 104 // 100), (1, 1)),
        ((10 * PAGE, 52 * PAGE), (1, 5)),  # Gemma-3-27b: 10 full layers, 52 with a window
        ((5 * PAGE, 29 * PAGE), (1, 6)),  # Gemma-3-4b
        ((52 * PAGE, 10 * PAGE), (5, 1)),
        ((393_216, 268_288), (3, 2)),  # Qwen3.5: a page of attention, a state
        ((0, PAGE), (1, 1)),
        ((0, 10 * PAGE, 52 * PAGE), (1, 1, 5)),
        ((0, 0), (1, 1)),
    ],
)
def test_choose_parts_of_known_sizes_returns_parts(
    sizes: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    assert choose_parts(sizes) == parts


sizes_of_blocks = st.lists(st.integers(1, 400), min_size=1, max_size=3)


@given(sizes_of_blocks)
@example([100, 30, 7])
def test_choose_parts_needs_as_few_parts_as_a_brute_force(sizes: list[int]) -> None:
    parts = choose_parts(sizes)
    if (fewest := fewest_parts(sizes, most=10)) is not None:
        assert sum(parts) == fewest
        assert waste(sizes, parts) <= 0.05
    elif waste(sizes, parts) <= 0.05:
        assert max(parts) > 10


@given(st.lists(st.integers(1, 1 << 30), min_size=1, max_size=6))
def test_choose_parts_has_at_most_64_parts_and_the_least_waste(sizes: list[int]) -> None:
    parts = choose_parts(sizes)
    assert len(parts) == len(sizes)
    assert all(1 <= count <= MAX_PARTS for count in parts)
    if waste(sizes, parts) > 0.05:
        slots = {-(-size // count) for size in sizes for count in range(1, MAX_PARTS + 1)}
        choices = [[-(-size // slot) for size in sizes] for slot in slots]
        within = [choice for choice in choices if max(choice) <= MAX_PARTS]
        assert waste(sizes, parts) == min(waste(sizes, choice) for choice in within)


def test_choose_parts_of_sizes_without_a_common_slot_keeps_the_least_waste() -> None:
    parts = choose_parts((1, 1000))
    assert parts == (1, 63)  # slots of 16 bytes: no choice of at most 64 parts has smaller ones
    assert slot_nbytes((1, 1000), parts) == 16


def test_choose_parts_with_another_limit_wastes_less() -> None:
    assert choose_parts((100, 104)) == (1, 1)
    exact = choose_parts((100, 104), most_waste=0.0)
    assert exact == (25, 26)
    assert waste((100, 104), exact) == 0
