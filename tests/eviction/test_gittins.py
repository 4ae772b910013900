"""The learned policy: its invariants, what it observes, and how it ranks blocks."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction import Gittins, Lru
from kvcache.eviction.gittins.epochs import Cohort, RankedRun
from kvcache.eviction.gittins.hazards import (
    CLASS_COUNT,
    FIRST_OCTAVE_S,
    LAST,
    NEW,
    OCTAVE_COUNT,
    OCTAVE_STARTS_S,
    REUSED_2,
    Hazards,
    octave_of,
)
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.index import Index
from kvcache.replay.simulate import SimulatedTiers
from kvcache.testing import evict_blocks
from tests.support.fixed_hazards import FixedHazards

chains = st.text("01", min_size=1, max_size=8)
pauses = st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0, 100.0, 1e4, 1e7])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(st.tuples(chains, st.integers(0, 8), st.integers(1, 9), pauses), max_size=50),
)
def test_gittins_under_random_calls_keeps_its_invariants(
    history: int, requests: list[tuple[str, int, int, float]]
) -> None:
    """Through the index: chunks, pins, drops, failed and generated blocks, a cleared index."""
    now = 0.0
    policy = Gittins(8, known_limit=8 + history)
    index = Index(policy, lambda: now)
    index.open_slots(8)
    for chain, action, step, pause in requests:
        now += pause
        names = [chain[: at + 1].encode() for at in range(len(chain))]
        found = index.access(names, 0) if action != 7 else 0
        policy.check(index.ready())
        slots = index.pin(names[: min(action, found)])
        for at in range(0, len(names), step):
            _, reserved = index.reserve(names[at : at + step], names[at - 1] if at else None)
            policy.check(index.ready())
            now += 0.05
            index.publish(reserved, names[:1] if action == 6 else ())
            policy.check(index.ready())
        index.unpin(slots)
        if action == 8:
            index.drop([names[-1], names[0]])
        if action == 5 and step == 9:
            index.clear()
        policy.check(index.ready())
        index.check()


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def run_with(policy: Gittins, key: bytes) -> RankedRun:
    return policy.runs[policy.run_ids[key]]


def cohort_of(policy: Gittins, key: bytes) -> Cohort:
    return run_with(policy, key).cohort


def all_uses(policy: Gittins) -> set[int]:
    return {run.uses for run in policy.runs.values()}


def add_observations(
    hazards: Hazards, cls: int, by_octave: Sequence[float], blocks: int = 100_000
) -> None:
    """Let ``hazards`` observe and learn these hazards of a class."""
    remaining = float(blocks)
    for octave, hazard in enumerate(by_octave):
        hazards.add_at_risk(cls, octave, octave, int(remaining))
        hazards.reused[cls][octave] += int(remaining * hazard)
        remaining *= 1 - hazard
    hazards.learn()


def unlimited(capacity: int) -> LruBudget:
    """A budget that lets all blocks be missing."""
    return LruBudget(capacity, stake=1e9)


def test_gittins_before_learning_evicts_as_lru() -> None:
    gittins, lru = SimulatedTiers(Gittins, [40]), SimulatedTiers(Lru, [40])
    for at in range(300):
        chain = [b"%d/%d" % ((at * at) % 23, n) for n in range(3)]
        gittins.request(chain, float(at))
        lru.request(chain, float(at))
        assert set(gittins.front.ready()) == set(lru.front.ready())


def test_reserve_of_blocks_worth_less_than_the_victims_declines_them() -> None:
    policy, now = Gittins(4, budget=unlimited(4)), 0.0
    index = Index(policy, lambda: now)
    index.open_slots(4)
    for names in ("ab", "ab", "ab"):
        index.access(keys(names), 0)
        index.publish(index.reserve(keys(names), None)[1])
        index.access(keys("?"), 0)
        now += 10
    index.publish(index.reserve(keys("x"), None)[1])
    add_observations(policy.hazards, NEW, [0.0] * OCTAVE_COUNT)
    add_observations(policy.hazards, LAST, [0.0] * OCTAVE_COUNT)
    add_observations(policy.hazards, REUSED_2, [0.2] * OCTAVE_COUNT)
    policy.sort_queues()
    index.access(keys("cdefg"), 0)
    assert index.reserve(keys("cdefg"), None)[0] == [0, 1]  # a free slot, and that of `x`
    assert (index.evicted_blocks, index.declined_blocks) == (1, 3)
    assert all(key in index for key in keys("ab"))


def test_lookup_of_evicted_blocks_counts_as_reuse() -> None:
    policy = Gittins(2)
    index = Index(policy, itertools.count(0.0, 8.0).__next__)
    index.open_slots(2)
    for names in ("ab", "cd", "ab", "cd"):
        index.access(keys(names), 0)
        index.publish(index.reserve(keys(names), None)[1])
    assert index.hit_blocks == 0
    policy.hazards.learn()
    assert sum(map(sum, policy.hazards.reused)) == 4
    assert sum(at_risk[0] for at_risk in policy.hazards.at_risk) == 8  # two for each lookup


def test_repeated_lookup_of_a_waiting_request_is_one_use() -> None:
    policy = Gittins(4)
    for now in range(50):
        policy.access(keys("abc"), 0, float(now))
    assert all_uses(policy) == {1}
    policy.access(keys("abc"), 2, 51.0)
    assert all_uses(policy) == {2}


def test_prefetch_and_the_lookup_after_it_are_one_use() -> None:
    policy = Gittins(4)
    policy.access(keys("ab"), 0, 0.0)
    policy.add(keys("ab"), None, 1.0)
    assert evict_blocks(policy) == keys("ba")
    policy.add(keys("ab"), None, 100.0)  # promoted from a lower tier
    policy.access(keys("ab"), 2, 101.0)
    assert all_uses(policy) == {2}
    policy.check(keys("ab"))


@pytest.mark.parametrize("partial", [False, True])
def test_last_blocks_are_a_class_only_if_they_are_not_reused(partial: bool) -> None:
    policy = Gittins(100)
    for at in range(100):
        chain = [b"%d/%d" % (at, n) for n in range(4)]
        for turn in range(3):
            tail = [b"%d/%d partial" % (at, turn)] if partial else []
            policy.access([*chain, *tail], 0, at * 10.0 + turn)
            chain += [b"%d/%d more" % (at, turn)]
    assert policy.last_blocks.separate == partial


def test_epoch_ends_after_seconds_or_blocks() -> None:
    policy = Gittins(3200)
    for name, now in zip("abc", (0.0, 3.0, 6.0), strict=True):
        policy.access(keys(name), 0, now)
    first, second, third = (cohort_of(policy, key) for key in keys("abc"))
    assert first is second is not third
    for at in range(100):  # a thirty-second of the slots
        policy.access([b"%d" % at], 0, 6.0)
    policy.access(keys("d"), 0, 6.0)
    assert cohort_of(policy, b"d") is not third is cohort_of(policy, b"0")


def test_worth_and_octave_change_only_between_epochs() -> None:
    policy = Gittins(3200)
    policy.access(keys("a"), 0, 0.0)
    policy.access(keys("b"), 0, 10.0)
    cohort = cohort_of(policy, b"a")
    before = policy.worth(cohort), cohort.epoch.octave
    policy.access(keys("c"), 0, 13.9)
    assert (policy.worth(cohort), cohort.epoch.octave) == before
    policy.access(keys("d"), 0, 14.0)
    assert policy.worth(cohort) < before[0]
    assert cohort.epoch.octave == octave_of(14.0)


def test_first_victim_is_kept_until_a_cohort_worth_less_is_queued() -> None:
    tables = [[float(cls)] * (OCTAVE_COUNT + 1) for cls in range(CLASS_COUNT)]
    policy = Gittins(3200, FixedHazards(tables), unlimited(3200))
    policy.last_blocks.separate = False

    def store(names: str, now: float) -> None:
        policy.access(keys(names), 0, now)
        policy.add(keys(names), None, now)

    def worth_and_class() -> tuple[float, int]:
        victim = policy.first_victim(protect_recent=False)
        assert victim is not None
        return victim[0], victim[1].cls

    store("a", 0.0)
    store("a", 1.0)
    assert worth_and_class() == (REUSED_2, REUSED_2)
    store("b", 2.0)
    assert worth_and_class() == (NEW, NEW)
    store("b", 3.0)  # no new block is left
    assert worth_and_class() == (REUSED_2, REUSED_2)


def test_runs_of_one_cohort_are_evicted_least_recently_used_first() -> None:
    policy = Gittins(3200)
    policy.last_blocks.separate = False
    for at, name in enumerate("ab"):
        for use in range(2):
            policy.access(keys(name), use, 0.01 * at + use)
            policy.add(keys(name) if not use else [], None, 0.01 * at + use)
    assert cohort_of(policy, b"a") is cohort_of(policy, b"b")
    policy.access(keys("a"), 1, 2.0)
    assert cohort_of(policy, b"a") is cohort_of(policy, b"b")
    assert evict_blocks(policy) == keys("ba")


def test_generated_blocks_renew_the_run_that_they_continue() -> None:
    policy = Gittins(100)
    policy.access(keys("abc?"), 0, 0.0)
    policy.add(keys("abc"), None, 0.0)
    policy.access(keys("xy!"), 0, 1.0)
    policy.add(keys("xy"), None, 1.0)
    for at in range(50):
        policy.add([b"%d" % at], b"%d" % (at - 1) if at else b"c", 10.0 * at)
        policy.advance(10.0 * at + 5)
    assert run_with(policy, b"49") is run_with(policy, b"a")
    policy.hazards.learn()
    at_risk = [sum(column) for column in zip(*policy.hazards.at_risk, strict=True)]
    assert at_risk[0] == len(policy.run_ids)
    assert sorted(at_risk, reverse=True) == at_risk, "a block reached an age twice"
    policy.check(set(policy.run_ids) - set(keys("?!")))
    assert evict_blocks(policy, 3) == [b"y", b"x", b"49"]


def test_long_generated_answer_is_several_runs() -> None:
    policy, chain = Gittins(2000), [b"%d" % at for at in range(1000)]
    policy.access(chain[:10], 0, 0.0)
    policy.add(chain[:10], None, 0.0)
    for at in range(10, 1000):
        policy.add(chain[at : at + 1], chain[at - 1], 0.01 * at)
    assert sorted(len(run.keys) for run in policy.runs.values()) == [1, 9, 222, 256, 256, 256]
    policy.check(chain)


def test_known_keys_are_at_most_the_limit() -> None:
    policy = Gittins(10)
    for at in range(20_000):
        policy.access([b"%d/%d" % (at, n) for n in range(3)], 0, float(at))
    assert len(policy.run_ids) == policy.known_limit
    policy.check([])


def filled_with_epochs(count: int) -> Gittins:
    policy = Gittins(10)
    for at in range(count):
        policy.access([b"%d" % at], 0, 0.0)
    return policy


def young_epochs(policy: Gittins) -> int:
    return sum(map(len, policy.epochs_by_octave[:8]))


def test_lookup_after_a_silence_moves_a_bounded_number_of_epochs() -> None:
    policy = filled_with_epochs(3000)
    policy.access([b"new"], 0, 1e4)
    assert young_epochs(policy) > 2500
    policy.access([b"%d" % at for at in range(3000)], 0, 1e4)
    # A block of an epoch that is yet to move is counted as reused in the octave that it reached.
    policy.hazards.learn()
    reused, at_risk = policy.hazards.reused, policy.hazards.at_risk
    assert all(
        a <= b for rows in zip(reused, at_risk, strict=True) for a, b in zip(*rows, strict=True)
    )
    assert sum(map(sum, reused)) == 3000


def test_lookups_after_a_silence_move_all_epochs() -> None:
    policy = filled_with_epochs(3000)
    for at in range(20):
        policy.access([b"new %d" % at], 0, 1e4 + at)
    assert young_epochs(policy) < 30
    policy.check([])


@pytest.mark.parametrize("octave", range(OCTAVE_COUNT))
def test_octave_of_its_bounds(octave: int) -> None:
    assert octave_of(OCTAVE_STARTS_S[octave]) == octave
    assert octave_of(OCTAVE_STARTS_S[octave + 1] * 0.999) == octave


def test_octave_of_ages_outside_all_octaves() -> None:
    assert octave_of(1e12) == OCTAVE_COUNT - 1
    assert octave_of(-1.0) == 0


def test_worth_before_learning_falls_with_age() -> None:
    hazards = Hazards(10)
    worths = [hazards.worth(NEW, FIRST_OCTAVE_S * 1.1**step) for step in range(-20, 200)]
    assert worths == sorted(worths, reverse=True)


def test_worth_rises_towards_the_octave_of_the_reuses() -> None:
    hazards = Hazards(10)
    add_observations(hazards, NEW, [0.0] * 6 + [0.5, 0.5] + [0.0] * (OCTAVE_COUNT - 8))
    start, worth = OCTAVE_STARTS_S, hazards.worth
    assert worth(NEW, 0.0) < worth(NEW, start[5]) < worth(NEW, start[6])
    assert worth(NEW, start[6]) > 50 * worth(NEW, start[9])


def test_old_observations_fade() -> None:
    hazards = Hazards(10)
    add_observations(hazards, NEW, [0.5] * OCTAVE_COUNT)
    before = hazards.worth(NEW, 0.0)
    for _ in range(12):
        add_observations(hazards, NEW, [0.0] * OCTAVE_COUNT, blocks=6000)
    assert hazards.worth(NEW, 0.0) < before / 20


def test_class_without_observations_is_shrunk_towards_similar_classes() -> None:
    hazards = Hazards(10)
    add_observations(hazards, REUSED_2, [0.5] * OCTAVE_COUNT)
    _, _, last, extension, new, reused_2, reused_4, reused_16 = (
        hazards.worth(cls, 1.0) for cls in range(CLASS_COUNT)
    )
    assert reused_2 > reused_4 == reused_16 > new == extension == last


def test_of_blocks_with_merged_ages_the_oldest_is_evicted_first() -> None:
    hazards = Hazards(10)
    for _ in range(100):
        hazards.end_epoch(60.0, 1, 1)  # one lookup a minute
    hazards.learn()
    policy = Gittins(10, hazards)
    for at, name in enumerate("abc"):
        policy.access(keys(name), 0, float(at))
        policy.add(keys(name), None, float(at))
    assert hazards.worth(NEW, 0.0) == hazards.worth(NEW, 30.0)
    assert evict_blocks(policy) == keys("abc")
