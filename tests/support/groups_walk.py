"""Random walks of an engine with several KV cache groups."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvcache.connectors.transfer import device
from kvcache.connectors.vllm.vllm_names import has_name
from tests.support.played_groups import GroupsEngine
from tests.support.played_models import BLOCK, LONGEST, PlayedModel
from tests.support.played_ranks import Copying
from tests.support.played_scheduler import Play

VLLM_0_32 = has_name("v1.kv_cache_interface:KVCacheConfig.hash_block_size")


def prepare_walk(patch: pytest.MonkeyPatch) -> None:
    """Set the environment of walks, and have a load copy each layer in a call of its own."""
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("PYTHONHASHSEED", "0")  # vLLM's hashes are equal in all engines
    patch.setenv("KVCACHE__L1__CAPACITY", "0")  # an engine sets it
    patch.setattr(device, "MIN_CALL_NBYTES", 1)
    patch.setattr(device, "MIN_CUT_RUN_NBYTES", 1)


def random_play(
    model: PlayedModel,
    random: Random,
    *,
    second_runner: bool | None = None,
    is_ahead: bool | None = None,
    copying: Copying | None = None,
) -> Play:
    """Return a random way to run a model, as far as it is not chosen."""
    second = random.random() < 0.5 if second_runner is None else second_runner
    ahead = random.random() < 0.5 if is_ahead is None else is_ahead
    most = 2 if model.pipeline > 1 and second else 1  # as vLLM has batches in flight
    if model.pipeline > 1 and model.drafts and not second:
        # vLLM's scheduler without async scheduling counts the drafts of a step in flight as known
        # tokens. An engine without a connector then computes from wrong blocks, too.
        most = 0
    random_copying = Copying(
        # On a device the connector refuses models of which vLLM finds parts of blocks.
        pace=0 if model.finds_parts else random.choice((0, 1, 6, 60)),
        failing=random.choice((0.0, 0.1)),
        far=random.random() < 0.5,
    )
    return Play(
        second_runner=second,
        ahead=most * ahead,
        copying=copying or random_copying,
        room=random.choice((1.1, 1.5, 3.0)),
        budget=random.choice((32, 64, 200)),
        slots=random.choice((0.5, 2.0, 6.0)),
    )


class Talks:
    """Conversations that share prefixes.

    Args:
        random: chooses tokens and lengths.
        system: equal tokens at the beginning of all.
        sessions: share of the requests that are sessions.
    """

    def __init__(self, random: Random, *, system: int = 0, sessions: float = 0.0) -> None:
        self._random = random
        self._sessions = sessions
        self._system = [random.randrange(50) for _ in range(system)]
        self._talks: list[list[int]] = []
        self._asked = 0

    def ask(self, engine: GroupsEngine) -> None:
        """Add a request: a new conversation, the next turn of one, or another end of one."""
        random, tokens = self._random, self._system
        if self._talks and random.random() < 0.85:
            talk = random.choice(self._talks)
            tokens = talk[: random.choice((len(talk), len(talk), random.randrange(len(talk))))]
        answer = random.choice((1, 3, 10, 30))
        more = random.choice((1, 10, 40, 90))
        tokens = [*tokens, *(random.randrange(50) for _ in range(more))][: LONGEST - answer]
        if random.random() < 0.3 and len(tokens) > 2 * BLOCK:  # no token after the last block
            tokens = tokens[: len(tokens) // (2 * BLOCK) * 2 * BLOCK]
        self._asked += 1
        session = random.random() < self._sessions
        request = engine.ask(f"request{self._asked}", tokens, answer, session=session)
        self._talks = [*self._talks[-5:], request._all_token_ids]


def continue_session(engine: GroupsEngine, name: str) -> None:
    """Add the next part of a session, or end it if it is long."""
    random = engine.random
    answer, more = random.choice((1, 10)), random.choice((1, 17, 40))
    if engine.requests[name].num_tokens + answer + more > LONGEST:
        engine.abort(name)
    else:
        engine.ask(name, [random.randrange(50) for _ in range(more)], answer, session=True)


def walk(model: PlayedModel, folder: Path, seed: int, **chosen: Any) -> GroupsEngine:
    """Play random events; raise an AssertionError where a rule is broken.

    `chosen` are options of `random_play`.
    """
    random = Random(seed)
    engine = GroupsEngine(model, folder, random, random_play(model, random, **chosen))
    # With states, vLLM resumes a session wrongly if a step ran beyond its last part. Before 0.32 a
    # session keeps the hash of a block that it ended with another token.
    runs_beyond = model.drafts or engine.play.ahead > 1 or not VLLM_0_32
    talks = Talks(random, sessions=0.0 if runs_beyond else 0.2)
    forgetful = random.choice((0.1, 0.7))
    try:
        for _ in range(random.randrange(30, 100)):
            event = random.random()
            if event < 0.35:
                if random.random() < forgetful:
                    engine.lose_own_cache()
                talks.ask(engine)
            elif event < 0.40 and (names := list(engine.scheduler.requests)):
                engine.abort(random.choice(names))
            elif event < 0.41:
                engine.reset(preempts=random.random() < 0.5)
            elif event < 0.55 and (names := engine.sessions):
                continue_session(engine, random.choice(names))
            for _ in range(random.choice((0, 1, 3))):
                engine.step()
                engine.check_l1()
        engine.end()
    finally:
        engine.close()
    return engine
