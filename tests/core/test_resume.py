"""Where a request can resume, for all kinds of groups: compared with trying every end."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from kvcache.resume import GroupKeys, Needs, SideSearch, chain_resume, longest_resume

RULES = [
    Needs("window", 1),
    Needs("window", 5),
    Needs("window", 24),
    Needs("chunk", 8),
    Needs("chunk", 12),
    Needs("chunk", 13),
    Needs("state"),
]


def group_of(
    needs: Needs, block_tokens: int = 4, parts: int = 1, complete: int = 1 << 30, name: int = 0
) -> GroupKeys:
    """Return a group of which the first ``complete`` blocks have keys."""

    def keys(first: int, end: int) -> list[bytes]:
        return [
            b"%d/%d/%d" % (name, block, part)
            for block in range(first, min(end, complete))
            for part in range(parts)
        ]

    return GroupKeys(needs, block_tokens, parts, keys)


class HeldKeys:
    """Answers which keys are held, and counts the questions."""

    def __init__(self, holds: Callable[[bytes], bool]) -> None:
        self._holds = holds
        self.asked: Counter[bytes] = Counter()
        self.calls = 0

    def ask(self, keys: Sequence[bytes]) -> list[bool]:
        self.calls += 1
        self.asked.update(keys)
        return [self._holds(key) for key in keys]


def can_resume(
    groups: Sequence[GroupKeys], own: int, end: int, holds: Callable[[bytes], bool]
) -> bool:
    """Return whether every needed key is held, by the definition."""
    for group in groups:
        for block in group.needed(own, end):
            keys = group.keys(block, block + 1)
            if len(keys) < group.parts or not all(map(holds, keys)):
                return False
    return True


@pytest.mark.parametrize(
    ("needs", "end", "first"),
    [
        (Needs("all"), 9, 0),
        (Needs("window", 4), 9, 6),  # the next token, at position 9, sees those from 6 on
        (Needs("window", 4), 2, 0),
        (Needs("window", 1), 9, 9),
        (Needs("chunk", 8), 15, 8),
        (Needs("chunk", 8), 16, 16),
        (Needs("state"), 9, 8),
    ],
)
def test_first_token_follows_the_rule_of_the_group(needs: Needs, end: int, first: int) -> None:
    assert needs.first_token(end) == first


@pytest.mark.parametrize(
    ("needs", "own", "end", "needed"),
    [
        (Needs("all"), 8, 16, range(2, 4)),
        (Needs("all"), 8, 18, range(2, 5)),
        (Needs("window", 6), 0, 16, range(2, 4)),
        (Needs("window", 6), 12, 16, range(3, 4)),
        (Needs("chunk", 8), 0, 12, range(2, 3)),
        (Needs("chunk", 8), 0, 16, range(4, 4)),
        (Needs("chunk", 6), 0, 18, range(5, 5)),  # a chunk ends in the middle of a block
        (Needs("state"), 0, 16, range(3, 4)),
    ],
)
def test_needed_blocks_follow_the_rule_of_the_group(
    needs: Needs, own: int, end: int, needed: range
) -> None:
    assert group_of(needs).needed(own, end) == needed


@pytest.mark.parametrize("seed", range(400))
def test_longest_resume_is_that_of_a_search_of_every_end(seed: int) -> None:
    choose = random.Random(seed)
    step = choose.choice([1, 2, 4, 12])
    limit, own = choose.randint(0, 120), choose.randint(0, 40)
    groups = [
        group_of(
            choose.choice(RULES),
            block_tokens=choose.choice([2, 4, 6]),
            parts=choose.randint(1, 3),
            complete=choose.choice([1 << 30, 9]),
            name=name,
        )
        for name in range(choose.randint(1, 4))
    ]
    density = choose.choice([0.3, 0.7, 0.95])
    held: dict[bytes, bool] = {}

    def holds(key: bytes) -> bool:
        return held.setdefault(key, choose.random() < density)

    ends = [end for end in range(own + 1, limit + 1) if not end % step]
    expected = max((end for end in ends if can_resume(groups, own, end, holds)), default=own)
    answers = HeldKeys(holds)
    searches = [SideSearch(group, own, answers.ask) for group in groups]
    assert longest_resume(searches, own, limit, step) == expected
    assert max(answers.asked.values(), default=0) <= 1
    assert b"" not in answers.asked
    if expected > own:
        for group, search in zip(groups, searches, strict=True):
            needed = group.needed(own, expected)
            assert search.needed_keys(expected) == group.keys(needed.start, needed.stop)


def test_longest_resume_of_a_hit_asks_only_the_needed_keys() -> None:
    answers = HeldKeys(lambda _: True)
    groups = [group_of(Needs("window", 24), name=0), group_of(Needs("state"), name=1)]
    searches = [SideSearch(group, 0, answers.ask) for group in groups]
    assert longest_resume(searches, 0, 400, 4) == 400
    assert sorted(answers.asked) == [*sorted(b"0/%d/0" % at for at in range(94, 100)), b"1/99/0"]


def test_longest_resume_of_rare_states_asks_few_times() -> None:
    answers = HeldKeys(lambda key: key == b"0/3/0")
    search = SideSearch(group_of(Needs("state")), 0, answers.ask)
    assert longest_resume([search], 0, 4 * 2048, 4) == 16
    assert answers.calls <= 12
    assert len(answers.asked) <= 2048


def test_chain_resume_is_a_multiple_of_the_step() -> None:
    chain = group_of(Needs("all"), block_tokens=4, parts=2)
    assert chain_resume(chain, 11, 0, 4) == (20, 10)
    assert chain_resume(chain, 11, 0, 8) == (16, 8)
    assert chain_resume(chain, 11, 20, 4) == (20, 0)
