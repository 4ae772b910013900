"""The learned policy: what it keeps true, what it sees, and what it makes of that."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction import Gittins, Lru
from kvcache.eviction.gittins.epochs import RankedRun
from kvcache.eviction.gittins.hazards import (
    AGAIN,
    CLASSES,
    FIRST_S,
    LAST,
    NEW,
    OCTAVES,
    STARTS,
    Hazards,
    octave_of,
)
from kvcache.eviction.gittins.ranking import RankedRuns
from kvcache.index import Index
from kvcache.testing import evict_blocks
from tests.support.eviction_traffic import Replay, Request


def run_of(policy: RankedRuns, key: bytes) -> RankedRun:
    return policy._runs[policy._run_of[key]]


def check(policy: RankedRuns, held: set[bytes]) -> None:
    """Raise ``AssertionError`` where what is always true is not."""
    aged = [(octave, epoch) for octave, line in enumerate(policy._lines) for epoch in line]
    assert all(epoch.blocks and epoch.octave == octave for octave, epoch in aged)
    assert all(
        [epoch.time for epoch in line] == sorted(epoch.time for epoch in line)
        for line in policy._lines
    )
    epochs = [*(epoch for _, epoch in aged), policy._epoch]
    assert len(set(epochs)) == len(epochs)
    assert policy._epoch.octave == 0
    cohorts = [cohort for epoch in epochs for cohort in epoch.cohorts]
    assert [c for c in policy._open if c is not None] == sorted(
        policy._epoch.cohorts, key=lambda cohort: cohort.kind
    )

    runs = set(policy._runs.values())
    assert {run.cohort for run in runs} <= set(cohorts)
    assert all(run.number == number for number, run in policy._runs.items())
    assert all(run_of(policy, key) is run for run in runs for key in run.keys)
    assert sum(len(run.keys) for run in runs) == len(policy._run_of)
    assert sorted(key for run in runs for key in run.keys[: run.held]) == sorted(held)
    assert len(policy._run_of) <= max(policy._limit, len(held))
    for run in runs:
        found = [run in run.cohort.runs, run in run.cohort.parked]
        assert found.count(True) == (run.held > 0)
        assert run.held == len(run.keys) or run in policy._past
    assert set(policy._past) <= runs

    queued = {
        cohort: (kind, octave)
        for kind, queues in enumerate(policy._queues)
        for octave, queue in enumerate(queues)
        for cohort in queue
    }
    assert queued == {
        cohort: (cohort.kind, cohort.epoch.octave) for cohort in cohorts if cohort.runs
    }
    for cohort in cohorts:
        ours = [run for run in runs if run.cohort is cohort]
        assert cohort.blocks == sum(len(run.keys) for run in ours)
        assert set(cohort.runs) | set(cohort.parked) <= set(ours)
    recent = policy._trust.recent
    assert set(recent) == {epoch for epoch in epochs if epoch.recent}
    for epoch in epochs:
        ours = [run for run in runs if run.cohort.epoch is epoch]
        assert epoch.blocks == sum(len(run.keys) for run in ours)
        assert epoch.octave < policy._oldest
        if epoch.recent:
            assert epoch.missing == sum(len(run.keys) - run.held for run in ours)
    assert policy._trust.known == sum(epoch.blocks for epoch in recent)
    assert policy._trust.missing == sum(epoch.missing for epoch in recent)


chains = st.text("01", min_size=1, max_size=8)
pauses = st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0, 100.0, 1e4, 1e7])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(st.tuples(chains, st.integers(0, 8), st.integers(1, 9), pauses), max_size=50),
)
def test_what_is_always_true(limit: int, requests: list[tuple[str, int, int, float]]) -> None:
    """Through the index: chunks, pins, drops, decline, blocks nobody asked for, an answer."""
    now = 0.0
    policy = Gittins(8)
    policy._limit = 8 + limit
    index = Index(policy, lambda: now)
    index.open_slots(8)
    for chain, pinned, step, pause in requests:
        now += pause
        names = [chain[: at + 1].encode() for at in range(len(chain))]
        found = index.access(names, 0) if pinned != 7 else 0
        check(policy, set(index.ready()))
        slots = index.pin(names[: min(pinned, found)])
        for at in range(0, len(names), step):
            _, lent = index.reserve(names[at : at + step], names[at - 1] if at else None)
            check(policy, set(index.ready()))
            now += 0.05
            index.publish(lent, names[:1] if pinned == 6 else ())
            check(policy, set(index.ready()))
        index.unpin(slots)
        if pinned == 8:
            index.drop([names[-1], names[0]])
        if pinned == 5 and step == 9:
            index.clear()
        check(policy, set(index.ready()))
        index.check()


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def teach(policy: Gittins, kind: int, hazards: Sequence[float], blocks: int = 100_000) -> None:
    """Have ``policy`` know the hazards of a class."""
    left = float(blocks)
    for octave, hazard in enumerate(hazards):
        policy._hazards.at_risk(kind, octave, octave, int(left))
        policy._hazards.used[kind][octave] += int(left * hazard)
        left *= 1 - hazard
    policy._hazards.learn()
    policy._sort()


def trust(policy: Gittins) -> None:
    """Have ``policy`` do as it likes: it has won more than it can lose."""
    policy._trust._won = 1e9


def test_nothing_learned_is_lru() -> None:
    traffic = [
        Request(float(at), [b"%d/%d" % ((at * at) % 23, n) for n in range(3)]) for at in range(300)
    ]
    gittins, lru = Replay(Gittins, 40), Replay(Lru, 40)
    for request in traffic:
        gittins.play([request])
        lru.play([request])
        assert set(gittins.index.ready()) == set(lru.index.ready())


def test_what_would_go_at_once_is_not_stored() -> None:
    policy, now = Gittins(4), 0.0
    trust(policy)
    index = Index(policy, lambda: now)
    index.open_slots(4)
    for names in ("ab", "ab", "ab"):
        index.access(keys(names), 0)
        index.publish(index.reserve(keys(names), None)[1])
        index.access(keys("?"), 0)
        now += 10
    index.publish(index.reserve(keys("x"), None)[1])
    teach(policy, NEW, [0.0] * OCTAVES)
    teach(policy, LAST, [0.0] * OCTAVES)
    teach(policy, AGAIN, [0.2] * OCTAVES)
    index.access(keys("cdefg"), 0)
    assert index.reserve(keys("cdefg"), None)[0] == [0, 1]  # a free slot, and that of `x`
    assert (index.evicted_blocks, index.declined_blocks) == (1, 3)
    assert all(key in index for key in keys("ab"))


def test_what_was_evicted_is_seen_to_be_used_again() -> None:
    policy = Gittins(2)
    index = Index(policy, itertools.count(0.0, 8.0).__next__)
    index.open_slots(2)
    for names in ("ab", "cd", "ab", "cd"):
        index.access(keys(names), 0)
        index.publish(index.reserve(keys(names), None)[1])
    assert index.hit_blocks == 0
    policy._hazards.learn()
    assert sum(map(sum, policy._hazards.used)) == 4
    assert sum(risk[0] for risk in policy._hazards._risk) == 8  # two of each time asked


def test_a_request_that_asks_again_is_one_use() -> None:
    policy = Gittins(4)
    for now in range(50):
        policy.access(keys("abc"), 0, float(now))
    assert {run.uses for run in policy._runs.values()} == {1}
    policy.access(keys("abc"), 2, 51.0)
    assert {run.uses for run in policy._runs.values()} == {2}


def test_what_comes_back_before_it_is_asked_for_is_used_once() -> None:
    policy = Gittins(4)
    policy.access(keys("ab"), 0, 0.0)
    policy.add(keys("ab"), None, 1.0)
    assert evict_blocks(policy) == keys("ba")
    policy.add(keys("ab"), None, 100.0)  # a tier below had it
    policy.access(keys("ab"), 2, 101.0)
    assert {run.uses for run in policy._runs.values()} == {2}
    check(policy, set(keys("ab")))


def test_last_blocks_are_a_class_only_where_they_are_not_used_again() -> None:
    def play(partial: bool) -> Gittins:
        policy = Gittins(100)
        for at in range(100):
            chain = [b"%d/%d" % (at, n) for n in range(4)]
            for turn in range(3):
                tail = [b"%d/%d partial" % (at, turn)] if partial else []
                policy.access([*chain, *tail], 0, at * 10.0 + turn)
                chain += [b"%d/%d more" % (at, turn)]
        return policy

    assert play(partial=True)._ends.apart
    assert not play(partial=False)._ends.apart


def test_what_was_used_within_seconds_is_of_one_age() -> None:
    policy = Gittins(3200)
    for name, now in zip("abc", (0.0, 3.0, 6.0), strict=True):
        policy.access(keys(name), 0, now)
    first, second, third = (run_of(policy, key).cohort for key in keys("abc"))
    assert first is second is not third
    for at in range(100):  # a thirty-second of the slots
        policy.access([b"%d" % at], 0, 6.0)
    policy.access(keys("d"), 0, 6.0)
    assert run_of(policy, b"d").cohort is not third is run_of(policy, b"0").cohort


def test_within_an_epoch_no_time_passes() -> None:
    policy = Gittins(3200)
    policy.access(keys("a"), 0, 0.0)
    policy.access(keys("b"), 0, 10.0)
    cohort = run_of(policy, b"a").cohort
    before = policy._worth(cohort), cohort.epoch.octave
    policy.access(keys("c"), 0, 13.9)
    assert (policy._worth(cohort), cohort.epoch.octave) == before
    policy.access(keys("d"), 0, 14.0)
    assert policy._worth(cohort) < before[0]
    assert cohort.epoch.octave == octave_of(14.0)


def test_who_goes_first_is_remembered_until_what_is_worth_less_is_there() -> None:
    policy = Gittins(3200)
    trust(policy)
    policy._ends.apart = False
    policy._hazards.tables = [[float(kind)] * (OCTAVES + 1) for kind in range(CLASSES)]
    policy._sort()

    def hold(names: str, now: float) -> None:
        policy.access(keys(names), 0, now)
        policy.add(keys(names), None, now)

    def first() -> tuple[float, int]:
        found = policy._first(spare=False)
        assert found is not None
        return found[0], found[1].kind

    hold("a", 0.0)
    hold("a", 1.0)
    assert first() == (AGAIN, AGAIN)
    hold("b", 2.0)
    assert first() == (NEW, NEW)
    hold("b", 3.0)  # nothing new is left
    assert first() == (AGAIN, AGAIN)


def test_of_runs_of_one_age_the_last_that_was_used_goes_last() -> None:
    policy = Gittins(3200)
    policy._ends.apart = False
    for at, name in enumerate("ab"):
        for use in range(2):
            policy.access(keys(name), use, 0.01 * at + use)
            policy.add(keys(name) if not use else [], None, 0.01 * at + use)
    assert run_of(policy, b"a").cohort is run_of(policy, b"b").cohort
    policy.access(keys("a"), 1, 2.0)
    assert run_of(policy, b"a").cohort is run_of(policy, b"b").cohort
    assert evict_blocks(policy) == keys("ba")


def test_an_answer_makes_the_run_that_it_continues_the_newest() -> None:
    policy = Gittins(100)
    policy.access(keys("abc?"), 0, 0.0)
    policy.add(keys("abc"), None, 0.0)
    policy.access(keys("xy!"), 0, 1.0)
    policy.add(keys("xy"), None, 1.0)
    for at in range(50):
        policy.add([b"%d" % at], b"%d" % (at - 1) if at else b"c", 10.0 * at)
        policy._tick(10.0 * at + 5)
    assert run_of(policy, b"49") is run_of(policy, b"a")
    policy._hazards.learn()
    risk = [sum(column) for column in zip(*policy._hazards._risk, strict=True)]
    assert risk[0] == len(policy._run_of)
    assert sorted(risk, reverse=True) == risk, "a block came to an age twice"
    check(policy, set(policy._run_of) - set(keys("?!")))
    assert evict_blocks(policy, 3) == [b"y", b"x", b"49"]


def test_a_long_answer_is_several_runs() -> None:
    policy, chain = Gittins(2000), [b"%d" % at for at in range(1000)]
    policy.access(chain[:10], 0, 0.0)
    policy.add(chain[:10], None, 0.0)
    for at in range(10, 1000):
        policy.add(chain[at : at + 1], chain[at - 1], 0.01 * at)
    assert sorted(len(run.keys) for run in policy._runs.values()) == [1, 9, 222, 256, 256, 256]
    check(policy, set(chain))


def test_no_more_is_known_than_the_limit() -> None:
    policy = Gittins(10)
    for at in range(20_000):
        policy.access([b"%d/%d" % (at, n) for n in range(3)], 0, float(at))
    assert len(policy._run_of) == policy._limit
    check(policy, set())


def test_a_call_moves_a_bounded_number_of_runs() -> None:
    policy = Gittins(10)
    for at in range(3000):
        policy.access([b"%d" % at], 0, 0.0)
    policy.access([b"new"], 0, 1e4)
    late = sum(map(len, policy._lines[:8]))
    assert late > 2000
    for at in range(3000):
        policy._use((b"%d" % at,))  # as late as they are, they came to the age they are used at
    policy._hazards.learn()
    used, risk = policy._hazards.used, policy._hazards._risk
    assert all(a <= b for rows in zip(used, risk, strict=True) for a, b in zip(*rows, strict=True))
    assert sum(map(sum, used)) == 3000


def test_what_is_late_moves_later() -> None:
    policy = Gittins(10)
    for at in range(3000):
        policy.access([b"%d" % at], 0, 0.0)
    for at in range(20):
        policy.access([b"new %d" % at], 0, 1e4 + at)
    assert sum(map(len, policy._lines[:8])) < 30
    check(policy, set())


@pytest.mark.parametrize("octave", range(OCTAVES))
def test_ages_and_octaves(octave: int) -> None:
    assert octave_of(STARTS[octave]) == octave
    assert octave_of(STARTS[octave + 1] * 0.999) == octave


def test_an_age_beyond_all_octaves_is_in_the_last() -> None:
    assert octave_of(1e12) == OCTAVES - 1
    assert octave_of(-1.0) == 0


def test_worth_of_the_prior_falls_with_age() -> None:
    hazards = Hazards(10)
    worths = [hazards.worth(NEW, FIRST_S * 1.1**step) for step in range(-20, 200)]
    assert worths == sorted(worths, reverse=True)


def test_worth_rises_where_nobody_comes_back_soon() -> None:
    policy = Gittins(10)
    teach(policy, NEW, [0.0] * 6 + [0.5, 0.5] + [0.0] * (OCTAVES - 8))
    worth = policy._hazards.worth
    assert worth(NEW, 0.0) < worth(NEW, STARTS[5]) < worth(NEW, STARTS[6])
    assert worth(NEW, STARTS[6]) > 50 * worth(NEW, STARTS[9])


def test_what_was_learned_long_ago_is_forgotten() -> None:
    policy = Gittins(10)
    teach(policy, NEW, [0.5] * OCTAVES)
    before = policy._hazards.worth(NEW, 0.0)
    for _ in range(12):
        teach(policy, NEW, [0.0] * OCTAVES, blocks=6000)
    assert policy._hazards.worth(NEW, 0.0) < before / 20


def test_little_seen_is_drawn_to_what_is_alike() -> None:
    policy = Gittins(10)
    teach(policy, AGAIN, [0.5] * OCTAVES)
    tables = [policy._hazards.worth(kind, 1.0) for kind in range(CLASSES)]
    new, more, last, again, often, always = tables
    assert again > often == always > new == more == last


def test_of_ages_that_are_not_told_apart_the_older_goes_first() -> None:
    policy = Gittins(10)
    for _ in range(100):
        policy._hazards.passed(60.0, 1, 1)
    policy._hazards.learn()
    for at, name in enumerate("abc"):
        policy.access(keys(name), 0, float(at))
        policy.add(keys(name), None, float(at))
    policy._sort()
    assert policy._hazards.worth(NEW, 0.0) == policy._hazards.worth(NEW, 30.0)
    assert evict_blocks(policy) == keys("abc")
