"""Engines that the connector is off for, with one warning, and those that raise at start."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.messages import Refusal, Shard
from kvcache.connectors.vllm.refusals import refusal
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from tests.support.played_engine import (
    BLOCK,
    SHARD,
    PlayedEngine,
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


def _subclass(name: str, **fields: Any) -> Any:
    """A spec of vLLM's that inherits from FullAttentionSpec, with the fields of full attention."""
    from vllm.v1 import kv_cache_interface

    base = full_attention()
    return getattr(kv_cache_interface, name)(
        block_size=BLOCK,
        num_kv_heads=base.num_kv_heads,
        head_size=base.head_size,
        dtype=base.dtype,
        **fields,
    )


def mla() -> Any:
    return _subclass("MLAAttentionSpec")


def hidden_states() -> Any:
    return _subclass("HiddenStateCacheSpec")


def reference_window() -> Any:
    return _subclass("RSWASpec", rswa_window=64)


def sinks() -> Any:
    return _subclass("SinkFullAttentionSpec", sink_len=BLOCK)


def of_a_plugin() -> Any:
    """A spec that this connector does not know."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    class CompressedSpec(FullAttentionSpec):  # type: ignore[misc]
        pass

    base = full_attention()
    return CompressedSpec(
        block_size=BLOCK,
        num_kv_heads=base.num_kv_heads,
        head_size=base.head_size,
        dtype=base.dtype,
    )


def sinks_in_one_layer() -> Any:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs(
        block_size=BLOCK, kv_cache_specs={"a": full_attention(), "b": sinks()}
    )


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
        ([], "no KV cache"),
        ([full_attention, mamba], "mamba_cache_mode is 'none'"),
        ([mixed], "layers of one KV cache group need different blocks"),
        ([full_attention, sinks], "SinkFullAttentionSpec"),
        ([reference_window], "RSWASpec"),
        ([sinks], "SinkFullAttentionSpec"),
        ([hidden_states], "HiddenStateCacheSpec"),
        ([of_a_plugin], "CompressedSpec"),
        ([sinks_in_one_layer], "SinkFullAttentionSpec"),
        ([not_causal], "causal"),
    ],
    ids=[
        "no group",
        "states of another mode",
        "mixed",
        "sinks in a second group",
        "reference window",
        "sinks",
        "hidden states",
        "of a plugin",
        "sinks in one layer",
        "not causal",
    ],
)
def test_scheduler_of_an_unsupported_cache_keeps_nothing(
    specs: list[Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    side = SchedulerSide(engine_config(), cache_config(*[spec() for spec in specs]), {})
    side.open({})
    played = PlayedEngine(side)
    request = Request("a", 3 * BLOCK)
    assert played.admit(request, [1, 2, 3]) == 0
    with pytest.raises(AssertionError):
        played.step((request, 3 * BLOCK))  # `build_step` returns None
    side.finish(request)
    side.reset()
    assert side.stats() is None
    side.close()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()


@pytest.mark.parametrize("spec", [full_attention, mla])
def test_refusal_of_full_attention_is_none(spec: Any) -> None:
    assert refusal(engine_config(), cache_config(spec())) is None


def unsupported(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM's ModelConfig for MEAN, CLS and STEP pooling and for encoder-decoders."""
    engine.model_config.is_prefix_caching_supported = False


def without_chunks(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's CPU platform sets it for MLA without AMX."""
    engine.cache_config.enable_prefix_caching = False
    engine.scheduler_config.enable_chunked_prefill = False


def batch_invariant(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    engine.cache_config.enable_prefix_caching = False


def routed_experts(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config

    if not hasattr(vllm.config, "AuxOutputConfig"):
        pytest.skip("vLLM before 0.31 has no auxiliary outputs")
    engine.aux_output_config = vllm.config.AuxOutputConfig(enable_return_routed_experts=True)


def routed_experts_of_old(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.model_config.enable_return_routed_experts = True


@pytest.mark.parametrize(
    ("configure", "reason"),
    [
        (unsupported, "does not support prefix caching"),
        (without_chunks, "prefix caching and chunked prefill are both off"),
        (batch_invariant, "VLLM_BATCH_INVARIANT"),
        (routed_experts, "routed experts"),
        (routed_experts_of_old, "routed experts"),
    ],
)
def test_scheduler_of_an_engine_that_cannot_resume_keeps_nothing(
    configure: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_config()
    configure(engine, monkeypatch)
    side = SchedulerSide(engine, cache_config(full_attention()), {})
    side.open(shards())
    assert side.stats() is None
    assert side.matched_tokens(Request("a", 100), 0) == 0
    [record] = caplog.records
    assert reason in record.getMessage()


def cleared_by_the_user(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.cache_config.enable_prefix_caching = False


def invariant_with_hits(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")


def whole_prompts_with_hits(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.scheduler_config.enable_chunked_prefill = False


@pytest.mark.parametrize(
    "configure", [cleared_by_the_user, invariant_with_hits, whole_prompts_with_hits]
)
def test_refusal_of_an_engine_that_can_resume_is_none(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_config()
    configure(engine, monkeypatch)
    assert refusal(engine, cache_config(full_attention())) is None


def test_scheduler_keeps_nothing_if_a_worker_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """A worker has the spec of every layer, the scheduler one for the whole group."""
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    refused = refusal(engine_config(), cache_config(sinks_in_one_layer()))
    assert refused is not None
    side.open({**shards(), (0, 1): Refusal(refused)})
    assert side.stats() is None
    assert side.matched_tokens(Request("a", 100), 0) == 0
    [record] = caplog.records
    assert "SinkFullAttentionSpec" in record.getMessage()


def test_worker_that_refuses_registers_nothing_and_returns_the_reason() -> None:
    from kvcache.connectors.vllm import KVCacheConnector

    connector = KVCacheConnector.__new__(KVCacheConnector)
    connector.refusal = "the reason"
    connector.register_kv_caches({})  # it has no worker side, and must not call it
    assert connector.get_handshake_metadata() == Refusal("the reason")


@pytest.mark.parametrize(
    ("device", "unit", "refused"),
    [
        ("cuda", BLOCK // 2, True),
        ("cuda", BLOCK, False),
        ("cuda", None, False),
        ("cpu", BLOCK // 2, False),
    ],
)
def test_refusal_of_hits_inside_a_block_is_for_devices_alone(
    device: str, unit: int | None, refused: bool
) -> None:
    engine = engine_config(device=device)
    engine.cache_config.prefix_match_unit = unit
    reason = refusal(engine, cache_config(full_attention()))
    assert (reason is not None) == refused
    if reason is not None:
        assert reason.startswith(
            f"prefix_match_unit is {BLOCK // 2}, below the block size, {BLOCK}"
        )


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_scheduler_with_context_parallelism_keeps_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    side = SchedulerSide(engine_config(2, "cpu", **{name: 2}), cache_config(full_attention()), {})
    assert side.matched_tokens(Request("a", 100), 0) == 0
    [record] = caplog.records
    assert f"{name} is 2" in record.getMessage()


def test_scheduler_of_full_attention_of_several_sizes_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = UniformTypeKVCacheSpecs(
        block_size=BLOCK, kv_cache_specs={"a": full_attention(), "b": full_attention()}
    )
    side = SchedulerSide(engine_config(), cache_config(spec), {})
    assert side.refusal is None


def test_open_without_a_rank_raises() -> None:
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    with pytest.raises(RuntimeError, match="1 of 2 workers"):
        side.open({(0, 0): Shard((SHARD,), host_name(), "form")})


def test_open_with_a_rank_on_another_host_raises() -> None:
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    elsewhere = shards() | {(0, 1): Shard((SHARD,), "elsewhere", "form")}
    with pytest.raises(RuntimeError, match=r"tensor rank 1 is on another host \(elsewhere\)"):
        side.open(elsewhere)


def test_step_before_the_handshake_raises() -> None:
    played = PlayedEngine(SchedulerSide(engine_config(), cache_config(full_attention()), {}))
    request = Request("a", BLOCK)
    played.admit(request, [1])
    with pytest.raises(RuntimeError, match="before its workers' handshake"):
        played.step((request, BLOCK))
