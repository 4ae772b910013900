"""``ReasonCounter``: counts by reason, and which reasons are new."""

from __future__ import annotations

from kvcache.reasons import MAX_REASONS, OTHER, ReasonCounter
from kvcache.testing.blocks import run_in_threads


def test_reason_counter_reports_each_reason_as_new_once() -> None:
    counter = ReasonCounter()
    assert [counter.add(reason, 2) for reason in ("full", "denied", "full")] == [True, True, False]
    assert counter.counts() == {"full": 4, "denied": 2}


def test_reason_counter_with_many_reasons_counts_the_rest_as_other() -> None:
    counter = ReasonCounter()
    new = [counter.add(f"{number}") for number in range(MAX_REASONS + 5)]
    assert new == [True] * MAX_REASONS + [False] * 5
    assert len(counter.counts()) == MAX_REASONS + 1
    assert counter.counts()[OTHER] == 5
    assert not counter.add("0")
    assert counter.counts()["0"] == 2


def test_reason_counter_in_threads_counts_all() -> None:
    counter = ReasonCounter()
    new: list[bool] = []

    def work(_: int) -> None:
        new.extend([counter.add("full") for _ in range(1000)])

    run_in_threads(4, work)
    assert (sum(new), counter.counts()) == (1, {"full": 4000})
