"""A replay is what the live stack does: the same hits, writes and evictions, tier by tier."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from kvcache.eviction import POLICIES, Eviction, Lru, policy_class
from kvcache.lower.tier import LowerTier
from kvcache.replay.generators import generate
from kvcache.replay.oracle import with_hints
from kvcache.replay.simulate import TICK, Outcome, replay
from kvcache.replay.trace import Request, Trace
from kvcache.sizes import DiskSize, Size
from kvcache.stack import Stack
from kvcache.stats import StackStats
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import Framed, frame_nbytes
from tests.support.eviction_traffic import with_conversation
from tests.support.traces import chains, conversation

BLOCK = 4096


class Recent(Lru):
    """A policy of somebody else's, that asks for the time."""

    times: Sequence[float] = []

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        Recent.times = []

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        Recent.times = [*Recent.times, now]
        super().access(chain, held, now)


class Declining(Lru):
    """Takes nothing from the third second on."""

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return len(keys) if now < 3 else 0


class Broken(Recent):
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        raise LookupError("a bug")


def counts(outcome: Outcome) -> list[tuple[int, int, int, int]]:
    return [
        (tier.hit_blocks, tier.read_blocks, tier.written_blocks, tier.evicted_blocks)
        for tier in outcome.tiers
    ]


def played(trace: Trace, stack: Stack, now: list[float]) -> Iterator[tuple[int, int]]:
    """Play ``trace`` on a live stack as a connector does; for each request what L1 had, and all."""
    for time_s, chain, done in zip(trace.times_s, trace.keys(), trace.done, strict=True):
        now[0] = time_s
        held = stack.front.contains(chain)
        coming = stack.prefetch(chain)
        if coming is not None:
            coming.result()
        with stack.fetch_local(chain) as lease:
            found = len(lease)
        yield sum(held[: min(found, (*held, False).index(False))]), found
        stack.reserve(chain[found:], chain[found - 1] if found else None).end()
        if done < len(chain):
            stack.hint(chain[done:], done=True)
        assert stack.flush(60)


def small(requests: int) -> Trace:
    """Traffic whose chains are short beside a tier of some hundred blocks."""
    return generate("rag", requests, seed=3)


@pytest.mark.parametrize("hints", [0.0, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_l1_does_the_same_live(policy: str, hints: float) -> None:
    trace, now = with_hints(small(600), hints), [0.0]
    tier = DramTier(
        block_nbytes=BLOCK,
        capacity=Size(300 * BLOCK),
        eviction=policy,  # type: ignore[arg-type]
        clock=lambda: now[0],
    )
    tier.slab.wait_populated()
    with Stack(tier, profile="test") as stack:
        found = sum(hits for _, hits in played(trace, stack, now))
        live = stack.stats().tiers[0]
    ours = replay(trace, policy, [300])
    assert ours.hit_blocks == found == live.hit_blocks > 0
    assert counts(ours) == [(found, found, live.stored_blocks, live.evicted_blocks)]
    assert ours.block_accesses == live.lookup_blocks == len(trace.blocks)


def test_a_disk_below_does_the_same_live(tmp_path: Path) -> None:
    trace, now = small(400), [0.0]
    with ExitStack() as opened:
        lru = Eviction("lru")
        front = DramTier(
            block_nbytes=BLOCK,
            capacity=Size(120 * BLOCK),
            eviction=lru,
            clock=lambda: now[0],
        )
        front.slab.wait_populated()
        disk = opened.enter_context(
            closing(
                DiskTier(
                    block_nbytes=frame_nbytes(BLOCK),
                    path=str(tmp_path),
                    capacity=DiskSize(4 << 20),
                    eviction=lru,
                    clock=lambda: now[0],
                )
            )
        )
        slots = disk._index.slots
        framed = Framed(disk, block_nbytes=BLOCK)
        lower = LowerTier(framed, name="l2", front=front, namespace=b"", deadline_s=60.0)
        stack = opened.enter_context(Stack(front, [lower], profile="test"))
        pairs = list(played(trace, stack, now))
        stats: StackStats = stack.stats()
        evicted = disk._index.evicted_blocks
    here, found = (sum(each) for each in zip(*pairs, strict=True))
    ours = replay(trace, "lru", [120, slots])
    below = stats.lower[0]
    assert found > here > 0
    assert not below.errors
    assert evicted > 0
    assert counts(ours)[0] == (
        here, found, stats.tiers[0].stored_blocks, stats.tiers[0].evicted_blocks,
    )  # fmt: skip
    assert counts(ours)[1] == (found - here, below.loaded_blocks, below.stored_blocks, evicted)


def test_what_is_found_below_is_not_computed() -> None:
    outcome = replay(chains([1, 2], [3, 4], [1, 2]), "lru", [2, 10])
    first, second = outcome.tiers
    assert outcome.hit_blocks == 2
    assert (first.hit_blocks, second.hit_blocks, second.read_blocks) == (0, 2, 2)
    assert (first.written_blocks, second.written_blocks) == (6, 4)


def test_a_block_counts_where_it_is_nearest() -> None:
    outcome = replay(chains([1, 2, 3], [4], [1, 2, 3]), "lru", [3, 10])
    assert [tier.hit_blocks for tier in outcome.tiers] == [2, 1]


def test_l1_declines_nothing_where_others_are_below_it() -> None:
    """What it does not take would reach no tier."""
    trace = chains([1, 2], [3, 4], [9], [1, 2], [9])
    [alone] = replay(trace, f"{__name__}:Declining", [2]).tiers
    first, _ = replay(trace, f"{__name__}:Declining", [2, 10]).tiers
    assert alone.declined_blocks > 0
    assert first.declined_blocks == 0


def test_a_chain_longer_than_l1_finds_what_l1_can_hold() -> None:
    outcome = replay(chains([1, 2, 3, 4], [5], [1, 2, 3, 4]), "lru", [2, 10])
    assert outcome.hit_blocks <= 2
    assert outcome.tiers[1].read_blocks <= 2


def test_tokens_are_those_of_the_blocks_found() -> None:
    requests = [Request(at, 10, [1, 2, 3]) for at in range(2)]
    assert replay(Trace.of(requests, 4), "lru", [9]).hit_tokens == 8
    assert replay(Trace.of(requests, 4, partial=True), "lru", [9]).hit_tokens == 10


def test_the_clock_is_the_traces() -> None:
    replay(chains([1], [2], [1], every_s=7.5), f"{__name__}:Recent", [2])
    assert Recent.times == [0.0, 7.5, 15.0]


def test_progress_is_told_and_adds_up() -> None:
    told: list[int] = []
    replay(chains(*([[1]] * (2 * TICK + 3))), "lru", [1], told.append)
    assert told == [TICK, TICK, 3]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lfu", 'no policy is called "lfu"; there are "gittins", "lru"'),
        ("no.such:Policy", "cannot import no.such:Policy (ModuleNotFoundError"),
        ("kvcache.eviction:Nope", "cannot import kvcache.eviction:Nope (AttributeError"),
        ("kvcache.index:Index", "kvcache.index:Index is no subclass"),
        ("kvcache.eviction:Policy", "kvcache.eviction:Policy lacks __init__, access"),
    ],
)
def test_a_policy_that_is_none_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match="^" + said.replace("(", r"\(")):
        policy_class(name)


@with_conversation
def test_the_conversation() -> None:
    found = {policy: replay(conversation(), policy, [10_000]) for policy in POLICIES}
    ratios = {name: each.hit_blocks / each.block_accesses for name, each in found.items()}
    print(ratios)
    assert ratios["lru"] == pytest.approx(0.2243, abs=0.001)
    assert all(0.18 < ratio < 0.382 for ratio in ratios.values())
    tokens = found["lru"].hit_tokens / found["lru"].prompt_tokens
    assert tokens == pytest.approx(0.2193, abs=0.001)
