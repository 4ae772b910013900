"""What the scheduler's half does not work with: a warning and no hits, or an error at start."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Shard
from kvcache.connectors.vllm.scheduler import SchedulerSide
from kvcache.connectors.vllm.support import host_name
from tests.connectors.played import (
    BLOCK,
    SHARD,
    Played,
    Request,
    cache_config,
    engine_config,
    full_attention,
    shards,
)

pytestmark = pytest.mark.engine


def sliding_window() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=64
    )


def mamba() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=BLOCK, shapes=((2, 2),), dtypes=(torch.float32,))


def mixed() -> Any:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs(
        block_size=BLOCK, kv_cache_specs={"a": full_attention(), "b": sliding_window()}
    )


def not_causal() -> Any:
    return replace(full_attention(), non_causal=True)


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([full_attention, full_attention], "2 KV cache groups"),
        ([], "0 KV cache groups"),
        ([sliding_window], "SlidingWindowSpec"),
        ([mamba], "MambaSpec"),
        ([mixed], "SlidingWindowSpec"),
        # What such a layer computes of a block depends on the tokens after it.
        ([not_causal], "causal"),
    ],
    ids=["two groups", "no group", "sliding window", "mamba", "mixed", "not causal"],
)
def test_a_cache_that_cannot_be_kept(
    specs: list[Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    side = SchedulerSide(engine_config(), cache_config(*[spec() for spec in specs]), {})
    side.open({})
    played = Played(side)
    request = Request("a", 3 * BLOCK)
    assert played.admit(request, [1, 2, 3]) == 0
    with pytest.raises(AssertionError):
        played.step((request, 3 * BLOCK))  # None: there is nothing to do
    side.finished(request)
    side.reset()
    assert side.stats() is None
    side.close()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallel_cannot_be_kept(name: str, caplog: pytest.LogCaptureFixture) -> None:
    side = SchedulerSide(engine_config(**{name: 2}), cache_config(full_attention()), {})
    assert side.matched_tokens(Request("a", 100), 0) == 0
    [record] = caplog.records
    assert f"{name} is 2" in record.getMessage()


def test_full_attention_of_several_sizes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = UniformTypeKVCacheSpecs(
        block_size=BLOCK, kv_cache_specs={"a": full_attention(), "b": full_attention()}
    )
    side = SchedulerSide(engine_config(), cache_config(spec), {})
    assert side._refusal is None


def test_a_missing_rank_is_an_error() -> None:
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    with pytest.raises(RuntimeError, match="1 of 2 workers"):
        side.open({(0, 0): Shard(SHARD, host_name(), "form")})


def test_a_rank_on_another_host_is_an_error() -> None:
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    elsewhere = shards() | {(0, 1): Shard(SHARD, "elsewhere", "form")}
    with pytest.raises(RuntimeError, match=r"tensor rank 1 is on another host \(elsewhere\)"):
        side.open(elsewhere)


def test_workers_that_said_nothing_are_an_error() -> None:
    played = Played(SchedulerSide(engine_config(), cache_config(full_attention()), {}))
    request = Request("a", BLOCK)
    played.admit(request, [1])
    with pytest.raises(RuntimeError, match="never said"):
        played.step((request, BLOCK))
