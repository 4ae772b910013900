"""A replay for a model with KV cache groups: its rules, and that it equals a live stack."""

from collections.abc import Sequence

import pytest

from kvcache.eviction import POLICIES
from kvcache.models import PRESETS, preset
from kvcache.models.layers import ModelGroup
from kvcache.replay.generators import generate
from kvcache.replay.groups import (
    STEP_TOKENS,
    GroupsOutcome,
    ModelBlocks,
    SimulatedGroups,
    TraceBlocks,
    replay_model,
)
from kvcache.replay.oracle import with_hints
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Request, Trace
from kvcache.resume import Needs
from kvcache.sizes import Size
from kvcache.stack import Stack
from kvcache.tiers.dram import DramTier

BLOCK = 4096
T = 512


def model_of(*groups: tuple[Needs, int]) -> ModelBlocks:
    """Return a model of these rules and parts, with blocks of ``T`` tokens."""
    return ModelBlocks(
        "test",
        tuple(ModelGroup(needs, 1, T, BLOCK * parts, BLOCK * parts) for needs, parts in groups),
        tuple(parts for _, parts in groups),
        BLOCK,
        T,
    )


FULL = (Needs("all"), 1)
WINDOW = model_of(FULL, (Needs("window", 600), 2))
STATE = model_of((Needs("all"), 2), (Needs("state"), 3))
CHUNK = model_of(FULL, (Needs("chunk", 2 * T), 1))
ALONE = model_of((Needs("window", 600), 1))


def prompts(*chains: Sequence[int]) -> Trace:
    """Return prompts of these blocks and one token more, one per second."""
    return Trace.of([Request(at, len(ids) * T + 1, ids) for at, ids in enumerate(chains)], T)


def tokens(outcome: GroupsOutcome) -> tuple[int, int]:
    return outcome.hit_tokens // T, outcome.lost_tokens // T


def test_replay_of_one_group_equals_the_replay_of_blocks() -> None:
    per_step = STEP_TOKENS // T
    trace = prompts(*(chain[:per_step] for chain in generate("rag", 400).chains()))
    for policy in POLICIES:
        groups, plain = (
            replay_model(trace, model_of(FULL), policy, 300),
            replay(trace, policy, [300]),
        )
        assert groups.hit_tokens == plain.hit_tokens > 0
        assert groups.written_blocks == plain.tiers[0].written_blocks


@pytest.mark.parametrize(
    ("model", "hit", "lost"),
    [
        (model_of(FULL), 3 + 4, 0),
        (WINDOW, 3 + 4, 0),
        (CHUNK, 3 + 4, 0),
        (ALONE, 3 + 4, 0),
        (STATE, 0 + 4, 3),  # the first request has no state after three blocks
    ],
)
def test_replay_with_room_for_all_blocks_finds_what_each_rule_allows(
    model: ModelBlocks, hit: int, lost: int
) -> None:
    trace = prompts([0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5])
    assert tokens(replay_model(trace, model, "lru", 100)) == (hit, lost)


def test_replay_keeps_a_state_at_the_end_of_each_step() -> None:
    per_step = STEP_TOKENS // T
    first = list(range(2 * per_step + 3))
    trace = prompts(first, [*first[: per_step + 2], 1000])
    outcome = replay_model(trace, STATE, "lru", 1000)
    assert tokens(outcome) == (per_step, 2)
    ends = 3 + 2  # of the steps of both requests
    assert outcome.held_blocks == (2 * (len(first) + 1), 3 * (ends - 1))


def test_replay_computes_the_last_token_of_a_prompt_of_whole_blocks() -> None:
    trace = Trace.of([Request(at, 2 * T, [0, 1]) for at in range(2)], T)
    assert replay_model(trace, WINDOW, "lru", 100).hit_tokens == T


def test_replay_reads_only_the_blocks_that_a_request_needs() -> None:
    trace = prompts(list(range(8)), list(range(8)))
    assert replay_model(trace, WINDOW, "lru", 100).read_blocks == 8 + 2 * 2


def test_replay_counts_tokens_that_were_lost_with_a_side_block() -> None:
    blocks = TraceBlocks(WINDOW, T)
    front = SimulatedGroups(POLICIES["lru"], 100, blocks, T)
    ids = [0, 1, 2]
    front.request(ids, 3 * T + 1, 0.0)
    _, side_keys = blocks.all_keys(ids, 2 * T)
    front.index.drop(side_keys)
    assert front.request(ids, 3 * T + 1, 1.0) == 2 * T
    assert (front.hit_tokens, front.lost_tokens) == (2 * T, T)


def test_replay_with_hints_finds_more() -> None:
    trace = generate("rag", 300)
    plain, hinted = (
        replay_model(each, WINDOW, "lru", 600) for each in (trace, with_hints(trace, 1.0))
    )
    assert plain.hit_tokens < hinted.hit_tokens


@pytest.mark.parametrize("name", PRESETS)
def test_blocks_of_a_preset_end_where_those_of_a_trace_end(name: str) -> None:
    for trace_tokens in (16, T):
        model = ModelBlocks.of(preset(name), trace_tokens)
        assert all(group.block_tokens % trace_tokens == 0 for group in model.groups)
        assert model.token_nbytes >= sum(
            group.block_nbytes / group.block_tokens for group in model.groups
        )


def test_block_of_a_model_with_states_has_room_for_a_state() -> None:
    model = ModelBlocks.of(preset("qwen3.5-27b"), T)
    full, state = model.groups
    assert full.block_tokens == state.block_tokens == model.align_tokens > T
    assert full.block_nbytes // full.layers >= state.block_nbytes // state.layers


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", [WINDOW, STATE, CHUNK, ALONE])
def test_replay_for_a_model_matches_a_live_stack(model: ModelBlocks, policy: str) -> None:
    trace, now, capacity = generate("rag", 300, seed=3), [0.0], 300
    tier = DramTier(
        block_nbytes=BLOCK,
        capacity=Size(capacity * BLOCK),
        eviction=policy,  # type: ignore[arg-type]
        clock=lambda: now[0],
    )
    tier.slab.wait_populated()
    blocks, hit_tokens = TraceBlocks(model, T), 0
    with Stack(tier, profile="test") as stack:
        for now[0], length, ids in zip(trace.times_s, trace.tokens, trace.chains(), strict=True):
            top = blocks.top(ids, length)
            found = stack.fetch_resume(blocks.groups(ids), 0, top, model.align_tokens)
            found.lease.end()
            hit_tokens += found.tokens
            for chains, sides in blocks.steps(ids, found.tokens):
                stack.reserve_branches(chains, sides).end()
        live = stack.stats().tiers[0]
    replayed = replay_model(trace, model, policy, capacity)
    assert replayed.hit_tokens == hit_tokens > 0
    assert replayed.written_blocks == live.stored_blocks
    assert sum(replayed.held_blocks) == live.used_blocks
