"""A replay has the hits, writes and evictions of a live stack, tier by tier."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from kvcache.eviction import POLICIES, Eviction, Lru, policy_class
from kvcache.lower.tier import LowerTier
from kvcache.replay.generators import generate
from kvcache.replay.oracle import with_hints
from kvcache.replay.simulate import PROGRESS_REQUESTS, Outcome, replay
from kvcache.replay.trace import Request, Trace
from kvcache.sizes import DiskSize, Size
from kvcache.slab import slot_nbytes_for
from kvcache.stack import Stack
from kvcache.stats import StackStats
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import Framed, frame_nbytes
from tests.support.traces import conversation, needs_conversation, trace_of

BLOCK = 4096


class NotesTimes(Lru):
    """A user's policy that notes the times of its calls."""

    times: Sequence[float] = []

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        NotesTimes.times = []

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        NotesTimes.times = [*NotesTimes.times, now]
        super().access(chain, held, now)


class Declining(Lru):
    """Declines all blocks from the third second on."""

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return len(keys) if now < 3 else 0


class Broken(Lru):
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        raise LookupError("a bug")


def counts(outcome: Outcome) -> list[tuple[int, int, int, int]]:
    return [
        (tier.hit_blocks, tier.read_blocks, tier.written_blocks, tier.evicted_blocks)
        for tier in outcome.tiers
    ]


def serve_live(trace: Trace, stack: Stack, now: list[float]) -> Iterator[tuple[int, int]]:
    """Serve ``trace`` with a live stack as a connector does.

    Yields for each request the leading blocks that L1 held, and those that any tier held.
    """
    for time_s, chain, done in zip(trace.times_s, trace.keys(), trace.done, strict=True):
        now[0] = time_s
        held = stack.front.contains(chain)
        if (promotion := stack.prefetch(chain)) is not None:
            promotion.result()
        with stack.fetch_local(chain) as lease:
            found = len(lease)
        yield sum(held[: min(found, (*held, False).index(False))]), found
        stack.reserve(chain[found:], chain[found - 1] if found else None).end()
        if done < len(chain):
            stack.hint(chain[done:], done=True)
        assert stack.flush(60)


def short_chains(requests: int) -> Trace:
    """Return traffic with chains that are short beside a tier of some hundred blocks."""
    return generate("rag", requests, seed=3)


@pytest.mark.parametrize("hints", [0.0, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_replay_of_l1_matches_a_live_stack(policy: str, hints: float) -> None:
    trace, now = with_hints(short_chains(600), hints), [0.0]
    tier = DramTier(
        block_nbytes=BLOCK,
        capacity=Size(300 * BLOCK),
        eviction=policy,  # type: ignore[arg-type]
        clock=lambda: now[0],
    )
    tier.slab.wait_populated()
    with Stack(tier, profile="test") as stack:
        found = sum(hits for _, hits in serve_live(trace, stack, now))
        live = stack.stats().tiers[0]
    replayed = replay(trace, policy, [300])
    assert replayed.hit_blocks == found == live.hit_blocks > 0
    assert counts(replayed) == [(found, found, live.stored_blocks, live.evicted_blocks)]
    assert replayed.block_accesses == live.lookup_blocks == len(trace.blocks)


def test_replay_with_a_disk_tier_matches_a_live_stack(tmp_path: Path) -> None:
    trace, now = short_chains(400), [0.0]
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
        framed = Framed(disk, block_nbytes=BLOCK)
        lower = LowerTier(framed, name="l2", front=front, namespace=b"", deadline_s=60.0)
        stack = opened.enter_context(Stack(front, [lower], profile="test"))
        pairs = list(serve_live(trace, stack, now))
        stats: StackStats = stack.stats()
        usage = disk.usage()
    assert usage.limit_nbytes is not None
    slots, evicted = (
        usage.limit_nbytes // slot_nbytes_for(frame_nbytes(BLOCK)),
        usage.evicted_blocks,
    )
    here, found = (sum(each) for each in zip(*pairs, strict=True))
    replayed = replay(trace, "lru", [120, slots])
    below = stats.lower[0]
    assert found > here > 0
    assert not below.errors
    assert evicted
    assert counts(replayed)[0] == (
        here, found, stats.tiers[0].stored_blocks, stats.tiers[0].evicted_blocks,
    )  # fmt: skip
    assert counts(replayed)[1] == (found - here, below.loaded_blocks, below.stored_blocks, evicted)


def test_replay_promotes_blocks_of_a_lower_tier() -> None:
    outcome = replay(trace_of([1, 2], [3, 4], [1, 2]), "lru", [2, 10])
    first, second = outcome.tiers
    assert outcome.hit_blocks == 2
    assert (first.hit_blocks, second.hit_blocks, second.read_blocks) == (0, 2, 2)
    assert (first.written_blocks, second.written_blocks) == (6, 4)


def test_replay_counts_a_hit_for_the_nearest_tier() -> None:
    outcome = replay(trace_of([1, 2, 3], [4], [1, 2, 3]), "lru", [3, 10])
    assert [tier.hit_blocks for tier in outcome.tiers] == [2, 1]


def test_replay_with_lower_tiers_l1_declines_nothing() -> None:
    """A block that L1 declines would reach no tier."""
    trace = trace_of([1, 2], [3, 4], [9], [1, 2], [9])
    [alone] = replay(trace, f"{__name__}:Declining", [2]).tiers
    first, _ = replay(trace, f"{__name__}:Declining", [2, 10]).tiers
    assert alone.declined_blocks > 0
    assert first.declined_blocks == 0


def test_replay_of_a_chain_longer_than_l1_promotes_what_fits() -> None:
    outcome = replay(trace_of([1, 2, 3, 4], [5], [1, 2, 3, 4]), "lru", [2, 10])
    assert outcome.hit_blocks <= 2
    assert outcome.tiers[1].read_blocks <= 2


def test_replay_counts_the_tokens_of_hits() -> None:
    requests = [Request(at, 10, [1, 2, 3]) for at in range(2)]
    assert replay(Trace.of(requests, 4), "lru", [9]).hit_tokens == 8
    assert replay(Trace.of(requests, 4, partial=True), "lru", [9]).hit_tokens == 10


def test_replay_passes_the_times_of_the_trace_to_the_policy() -> None:
    replay(trace_of([1], [2], [1], every_s=7.5), f"{__name__}:NotesTimes", [2])
    assert NotesTimes.times == [0.0, 7.5, 15.0]


def test_replay_reports_progress() -> None:
    reports: list[int] = []
    replay(trace_of(*([[1]] * (2 * PROGRESS_REQUESTS + 3))), "lru", [1], reports.append)
    assert reports == [PROGRESS_REQUESTS, PROGRESS_REQUESTS, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lfu", 'no policy is called "lfu"; there are "gittins", "lru"'),
        ("no.such:Policy", "cannot import no.such:Policy (ModuleNotFoundError"),
        ("kvcache.eviction:Nope", "cannot import kvcache.eviction:Nope (AttributeError"),
        ("kvcache.index:Index", "kvcache.index:Index is no subclass"),
        ("kvcache.eviction:Policy", "kvcache.eviction:Policy lacks __init__, access"),
    ],
)
def test_policy_class_of_an_invalid_name_raises(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        policy_class(name)


@needs_conversation
def test_replay_of_the_conversation() -> None:
    outcomes = {policy: replay(conversation(), policy, [10_000]) for policy in POLICIES}
    ratios = {name: each.hit_blocks / each.block_accesses for name, each in outcomes.items()}
    assert ratios["lru"] == pytest.approx(0.2243, abs=0.001)
    assert all(0.18 < ratio < 0.382 for ratio in ratios.values())
    tokens = outcomes["lru"].hit_tokens / outcomes["lru"].prompt_tokens
    assert tokens == pytest.approx(0.2193, abs=0.001)
