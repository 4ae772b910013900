"""The LRU budget: it knows what LRU would hold, and limits what the learned policy can lose."""

import pytest

from kvcache.eviction import Gittins, Lru
from kvcache.eviction.gittins.epochs import Cohort, Epoch
from kvcache.eviction.gittins.hazards import (
    CLASS_COUNT,
    OCTAVE_COUNT,
    REUSED_2,
    REUSED_4,
    REUSED_16,
)
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.replay.simulate import SimulatedTiers
from kvcache.testing import evict_blocks
from tests.support.adversarial_traffic import TRAFFIC, traps
from tests.support.fixed_hazards import FixedHazards
from tests.support.traces import part, play, trace_of

# Only blocks that were reused are worth anything, at any age.
WRONG_TABLES = [
    [float(cls in (REUSED_2, REUSED_4, REUSED_16))] * (OCTAVE_COUNT + 1)
    for cls in range(CLASS_COUNT)
]


def with_wrong_tables(slots: int, budget: LruBudget) -> SimulatedTiers:
    return SimulatedTiers(lambda slots: Gittins(slots, FixedHazards(WRONG_TABLES), budget), [slots])


def with_budget(slots: int, budget: LruBudget) -> SimulatedTiers:
    return SimulatedTiers(lambda slots: Gittins(slots, budget=budget), [slots])


@pytest.mark.parametrize("slots", [300, 1000])
@pytest.mark.parametrize(
    ("name", "requests"), [("chat", 1500), ("rag", 1500), ("agent", 600), ("traps", 1500)]
)
def test_budget_counts_the_hits_of_lru(name: str, requests: int, slots: int) -> None:
    """With slots for several requests: of a request larger than all slots, LRU keeps more.

    The requests are so few that the budget does not halve its counts.
    """
    trace = TRAFFIC[name](requests)
    budget, lru = LruBudget(slots), SimulatedTiers(Lru, [slots])
    play(with_budget(slots, budget), trace)
    play(lru, trace)
    looked_up = lru.front.lookup_blocks
    counted = budget.looked_up / looked_up  # all but the current epoch
    assert budget.lru_hits / counted == pytest.approx(lru.front.hit_blocks, abs=0.02 * looked_up)


@pytest.mark.parametrize("slots", [100, 300])
def test_wrong_tables_cost_at_most_the_budget(slots: int) -> None:
    trace = part(traps(9000), 0, 1500)  # blocks come back soon: LRU is right
    wrong, lru = with_wrong_tables(slots, LruBudget(slots)), SimulatedTiers(Lru, [slots])
    play(wrong, trace)
    play(lru, trace)
    lost = lru.front.hit_blocks - wrong.front.hit_blocks
    turnovers = lru.front.lookup_blocks / slots
    assert 0 < lost <= 0.01 * slots * (2 + turnovers / 16) + 0.002 * lru.front.lookup_blocks


def test_wrong_tables_without_a_budget_cost_much() -> None:
    """The budget limits the loss in the test above, not the tables."""
    trace = part(traps(9000), 0, 1500)
    wrong = with_wrong_tables(300, LruBudget(300, stake=300.0))
    assert play(wrong, trace) < play(SimulatedTiers(Lru, [300]), trace) - 2


def test_missing_blocks_beyond_the_budget_do_not_increase() -> None:
    budget = LruBudget(300)
    tiers, overspent, trace = with_budget(300, budget), 0, traps(2400)
    for now, chain in zip(trace.times_s, trace.keys(), strict=True):
        missing, slack = budget.allowed_missing - budget.slack(), budget.slack()
        tiers.request(chain, now)
        if slack < 0:
            overspent += 1
            assert budget.allowed_missing - budget.slack() <= missing + 9
    assert overspent > 100


def test_eviction_from_a_recent_cohort_stops_at_the_budget() -> None:
    rising = [[float(octave) for octave in range(OCTAVE_COUNT + 1)]] * CLASS_COUNT
    policy = Gittins(3200, FixedHazards(rising), LruBudget(3200, stake=10.0))
    policy.last_blocks.separate = False
    for now in (0.0, 100.0):
        for name in range(10):
            chain = [b"%d %d/%d" % (now, name, at) for at in range(3)]
            policy.access(chain, 0, now)
            policy.add(chain, None, now)
    evicted = evict_blocks(policy, 30)
    young = [key for key in evicted if key.startswith(b"100")]
    assert evicted[: len(young)] == young  # the lowest worth, until the budget is used up;
    assert 10 <= len(young) <= 12  # the victims of LRU after that


def test_budget_where_lru_has_no_hits_allows_all_blocks_to_be_missing() -> None:
    budget = LruBudget(300)
    tiers = with_budget(300, budget)
    documents = [range(9 * at, 9 * at + 9) for at in range(100)]
    trace = trace_of(*documents, *documents[:10], *documents[10:12] * 3)
    play(tiers, part(trace, 0, 100))
    assert budget.allowed_missing == pytest.approx(3)
    play(tiers, part(trace, 100, 110))
    assert budget.hits_won < 30
    assert budget.allowed_missing == 300
    play(tiers, part(trace, 110, 116))
    assert budget.allowed_missing < 300


def test_budget_where_nothing_is_reused_stays_at_the_stake() -> None:
    budget = LruBudget(300)
    play(with_budget(300, budget), trace_of(*(range(9 * at, 9 * at + 9) for at in range(1000))))
    assert budget.allowed_missing == pytest.approx(3)


def cohorts(budget: LruBudget, *blocks: int) -> list[Cohort]:
    """Add a cohort of each size in an epoch of its own, oldest first."""
    added = [Cohort(0, Epoch(float(at))) for at in range(len(blocks))]
    for cohort, count in zip(added, blocks, strict=True):
        budget.recent[cohort.epoch] = None
        cohort.blocks = count
        budget.add_current(cohort.epoch, count, 0)
    return added


def test_uses_of_the_edge_count_as_lru_hits_by_share() -> None:
    budget = LruBudget(100)
    old, edge, *_ = cohorts(budget, 50, 40, 60, 30)
    assert [cohort.epoch.recent for cohort in (old, edge)] == [False, True]
    budget.take_used(edge, held=8, missing=0)  # LRU would hold a quarter of the edge
    assert budget.hits_won == 6
    budget.take_used(edge, held=0, missing=8)
    assert budget.hits_won == 4
    budget.take_used(old, held=3, missing=5)
    assert budget.hits_won == 7
    assert (budget.lru_hits, budget.late_reuses) == (4, 20)
    assert (old.blocks, edge.blocks, budget.recent_blocks) == (42, 24, 114)


def test_slack_falls_with_missing_blocks_and_rises_with_hits_won() -> None:
    budget = LruBudget(1000)
    old, _, edge, new = cohorts(budget, 100, 200, 200, 900)
    assert budget.slack() == 10
    budget.add_blocks(new, 0, 7)
    budget.add_blocks(edge, 0, 4)  # LRU would hold half of the edge
    assert budget.slack() == 1
    budget.add_blocks(old, 0, 50)
    assert budget.slack() == 1
    budget.take_used(old, held=5, missing=0)
    budget.add_current(new.epoch, 5, 0)
    # Five blocks for each hit; and LRU would hold a fortieth less of the edge.
    assert budget.slack() == pytest.approx(1 + 5 * 5 + 0.1)
    budget.add_blocks(new, 0, 25)
    budget.take_used(new, held=0, missing=25)
    budget.add_current(new.epoch, 25, 0)
    assert budget.slack() == pytest.approx(10 - 20 - 9 + 0.1)


@pytest.mark.parametrize(
    ("lru_hits", "late_reuses", "allowed"),
    [(100, 150, 10), (100, 350, 25), (100, 900, 40), (0, 100, 40)],
)
def test_stake_grows_with_the_odds_after_enough_lookups(
    lru_hits: int, late_reuses: int, allowed: int
) -> None:
    budget = LruBudget(1000)
    old, new = cohorts(budget, 500, 1000)
    budget.take_used(new, held=lru_hits, missing=0)
    budget.take_used(old, held=0, missing=late_reuses)
    budget.end_epoch(16_000)
    budget.add_current(new.epoch, 0, 0)
    assert budget.slack() == 10  # too few lookups
    budget.end_epoch(1)
    budget.add_current(new.epoch, 0, 0)
    assert budget.slack() == allowed


def test_lost_hits_are_forgotten_with_lookups() -> None:
    budget = LruBudget(100)
    (new,) = cohorts(budget, 100)
    budget.take_used(new, held=0, missing=50)
    for _ in range(160):
        budget.end_epoch(10)
    assert -50 * 0.4 < budget.hits_won < -50 * 0.3
    for _ in range(2000):
        budget.end_epoch(10)
    assert budget.hits_won > -0.1


def test_hits_won_are_at_most_the_capacity() -> None:
    budget = LruBudget(100)
    old, _ = cohorts(budget, 100, 100)
    budget.take_used(old, held=100_000, missing=0)
    budget.end_epoch(0)
    assert budget.hits_won == 100
