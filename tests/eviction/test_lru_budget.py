"""The learned policy's account of LRU: it is right, and nothing is risked that was not won."""

import pytest

from kvcache.eviction import Gittins, Lru
from kvcache.eviction.gittins.epochs import Cohort, Epoch
from kvcache.eviction.gittins.hazards import AGAIN, ALWAYS, CLASSES, OCTAVES, OFTEN
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.testing import evict_blocks
from tests.support.eviction_traffic import GENERATORS, Replay, Request, grown, traps


def learned_of(replay: Replay) -> tuple[Gittins, LruBudget]:
    assert isinstance(replay.policy, Gittins)
    return replay.policy, replay.policy._trust


def misled(replay: Replay) -> None:
    """Have the policy believe that only what was used again is worth anything, and for ever."""
    policy, _ = learned_of(replay)
    policy._hazards._next_learn = 1 << 60
    policy._hazards.tables = [
        [float(kind in (AGAIN, OFTEN, ALWAYS))] * (OCTAVES + 1) for kind in range(CLASSES)
    ]
    policy._sort()


@pytest.mark.parametrize("slots", [300, 1000])
@pytest.mark.parametrize("name", ["chat", "documents", "agents", "traps"])
def test_it_knows_what_lru_would_find(name: str, slots: int) -> None:
    """Where there are slots for some requests; LRU keeps more of one that is larger than all."""
    requests = GENERATORS[name](1500)
    learned, lru = Replay(Gittins, slots), Replay(Lru, slots)
    learned.play(requests)
    lru.play(requests)
    _, trust = learned_of(learned)
    asked = lru.index.lookup_blocks
    halved = asked / trust._asked
    assert trust._found * halved == pytest.approx(lru.index.hit_blocks, abs=0.02 * asked)


@pytest.mark.parametrize("slots", [100, 300])
def test_who_believes_what_is_wrong_is_lru_but_for_what_it_may_try(slots: int) -> None:
    requests = traps(9000)[:1500]  # who comes back does so soon: LRU is right
    wrong, lru = Replay(Gittins, slots), Replay(Lru, slots)
    misled(wrong)
    wrong.play(requests)
    lru.play(requests)
    lost = lru.index.hit_blocks - wrong.index.hit_blocks
    turnovers = lru.index.lookup_blocks / slots
    assert 0 < lost <= 0.01 * slots * (2 + turnovers / 16) + 0.002 * lru.index.lookup_blocks


def test_who_believes_what_is_wrong_and_may_try_all_loses_much() -> None:
    """The account is what saves the one above."""
    requests = traps(9000)[:1500]  # who comes back does so soon: LRU is right
    wrong, lru = Replay(Gittins, 300), Replay(Lru, 300)
    misled(wrong)
    learned_of(wrong)[1]._first = 300.0
    assert wrong.play(requests) < lru.play(requests) - 2


def test_when_too_much_is_missing_no_more_goes_missing() -> None:
    replay = Replay(Gittins, 300)
    _, trust = learned_of(replay)
    forced = 0
    for request in traps(2400):
        missing, had = trust._allowed - trust.slack(), trust.slack()
        replay.play([request])
        if had < 0:
            forced += 1
            assert trust._allowed - trust.slack() <= missing + 9
    assert forced > 100


def test_no_more_goes_of_a_cohort_than_may_be_missing() -> None:
    policy = Gittins(3200)
    policy._ends.apart = False
    policy._hazards.tables = [[float(octave) for octave in range(OCTAVES + 1)]] * CLASSES
    policy._sort()
    for now in (0.0, 100.0):
        for name in range(10):
            chain = [b"%d %d/%d" % (now, name, at) for at in range(3)]
            policy.access(chain, 0, now)
            policy.add(chain, None, now)
    policy._trust._allowed = 10
    gone = evict_blocks(policy, 30)
    young = [key for key in gone if key.startswith(b"100")]
    assert gone[: len(young)] == young  # what is worth least, until too much is missing,
    assert 10 <= len(young) <= 12  # and then what LRU would take


def test_where_lru_finds_nothing_there_is_nothing_to_lose() -> None:
    replay = Replay(Gittins, 300)
    _, trust = learned_of(replay)
    rounds = [Request(float(at), grown(f"document {at % 100}", 9)) for at in range(400)]
    replay.play(rounds[:100])
    assert trust._allowed == pytest.approx(3)
    replay.play(rounds[100:110])
    assert trust._won < 30
    assert trust._allowed == 300
    replay.play([Request(110.0 + at, rounds[110 + at % 2].keys) for at in range(6)])
    assert trust._allowed < 300


def test_what_never_comes_back_is_not_worth_a_try() -> None:
    replay = Replay(Gittins, 300)
    replay.play([Request(float(at), grown(f"once {at}", 9)) for at in range(1000)])
    assert learned_of(replay)[1]._allowed == pytest.approx(3)


def cohorts(trust: LruBudget, *blocks: int) -> list[Cohort]:
    """One of each epoch, the oldest first."""
    made = [Cohort(0, Epoch(float(at))) for at in range(len(blocks))]
    for cohort, count in zip(made, blocks, strict=True):
        trust.recent[cohort.epoch] = None
        cohort.blocks = count
        trust.of_now(cohort.epoch, count, 0)
    return made


def test_of_the_edge_a_share_is_what_lru_would_hold() -> None:
    trust = LruBudget(100)
    old, edge, *_ = cohorts(trust, 50, 40, 60, 30)
    assert [cohort.epoch.recent for cohort in (old, edge)] == [False, True]
    trust.used(edge, held=8, missing=0)  # LRU would have a quarter of them
    assert trust._won == 6
    trust.used(edge, held=0, missing=8)
    assert trust._won == 4
    trust.used(old, held=3, missing=5)
    assert trust._won == 7
    assert (trust._found, trust._beyond) == (4, 20)
    assert (old.blocks, edge.blocks, trust.known) == (42, 24, 114)


def test_what_is_missing_is_paid_for() -> None:
    trust = LruBudget(1000)
    old, _, edge, new = cohorts(trust, 100, 200, 200, 900)
    assert trust.slack() == 10
    trust.count(new, 0, 7)
    trust.count(edge, 0, 4)  # half of which LRU would hold
    assert trust.slack() == 1
    trust.count(old, 0, 50)
    assert trust.slack() == 1
    trust.used(old, held=5, missing=0)
    trust.of_now(new.epoch, 5, 0)
    assert trust.slack() == pytest.approx(1 + 5 * 5 + 0.1)  # a fortieth more of the edge is out
    trust.count(new, 0, 25)
    trust.used(new, held=0, missing=25)
    trust.of_now(new.epoch, 25, 0)
    assert trust.slack() == pytest.approx(10 - 20 - 9 + 0.1)


@pytest.mark.parametrize(
    ("found", "beyond", "allowed"), [(100, 150, 10), (100, 350, 25), (100, 900, 40), (0, 100, 40)]
)
def test_more_is_tried_where_more_comes_too_late_for_lru_than_it_finds(
    found: int, beyond: int, allowed: int
) -> None:
    trust = LruBudget(1000)
    old, new = cohorts(trust, 500, 1000)
    trust.used(new, held=found, missing=0)
    trust.used(old, held=0, missing=beyond)
    trust.passed(16_000)
    trust.of_now(new.epoch, 0, 0)
    assert trust.slack() == 10  # it is too early to say
    trust.passed(1)
    trust.of_now(new.epoch, 0, 0)
    assert trust.slack() == allowed


def test_a_loss_is_forgotten_in_time() -> None:
    trust = LruBudget(100)
    (new,) = cohorts(trust, 100)
    trust.used(new, held=0, missing=50)
    for _ in range(160):
        trust.passed(10)
    assert -50 * 0.4 < trust._won < -50 * 0.3
    for _ in range(2000):
        trust.passed(10)
    assert trust._won > -0.1


def test_no_more_is_won_than_the_slots() -> None:
    trust = LruBudget(100)
    old, _ = cohorts(trust, 100, 100)
    trust.used(old, held=100_000, missing=0)
    trust.passed(0)
    assert trust._won == 100
