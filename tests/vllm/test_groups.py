"""Which groups of vLLM are kept together, what they need, and how their keys are made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.groups import KeptGroup, groups_refusal, kept_groups
from kvcache.connectors.vllm.messages import Shard
from kvcache.connectors.vllm.scheduler.request_keys import RequestKeys
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from kvcache.resume import Needs
from tests.support.group_hooks import needs_group_hooks
from tests.support.played_engine import (
    BLOCK,
    Request,
    cache_config,
    engine_config,
    full_attention,
)

pytestmark = [pytest.mark.engine, needs_group_hooks]

WINDOW = 2 * BLOCK


def window(tokens: int = WINDOW, *, block_tokens: int = BLOCK, extra: int = 0) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=block_tokens, num_kv_heads=2, head_size=32, dtype=torch.bfloat16,
        sliding_window=tokens, extra_retained_tokens=extra,
    )  # fmt: skip


def chunk(tokens: int = WINDOW) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

    return ChunkedLocalAttentionSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16,
        attention_chunk_size=tokens,
    )  # fmt: skip


def state(block_tokens: int = BLOCK, mode: str = "align") -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(
        block_size=block_tokens, shapes=((2, 2),), dtypes=(torch.float32,), mamba_cache_mode=mode
    )


def rules(*specs: Any) -> list[tuple[Needs, tuple[int, ...], int]]:
    return [
        (group.needs, group.members, group.block_tokens)
        for group in kept_groups(cache_config(*specs))
    ]


def test_kept_groups_merge_equal_rules_and_begin_with_chains() -> None:
    assert rules(window(), window(), full_attention(), window(96), window()) == [
        (Needs("all"), (2,), BLOCK),
        (Needs("window", WINDOW), (0, 1, 4), BLOCK),
        (Needs("window", 96), (3,), BLOCK),
    ]
    assert rules(chunk(), state(96), full_attention()) == [
        (Needs("all"), (2,), BLOCK),
        (Needs("chunk", WINDOW), (0,), BLOCK),
        (Needs("state"), (1,), 96),
    ]


def test_kept_groups_window_includes_the_tokens_that_vllm_retains() -> None:
    assert rules(window(extra=3)) == [(Needs("window", WINDOW + 3), (0,), BLOCK)]


def test_kept_groups_of_several_block_sizes_span_hashes_of_their_own() -> None:
    first, second = kept_groups(cache_config(full_attention(), window(block_tokens=64)), 16)
    assert (first.hashes_per_block, second.hashes_per_block) == (2, 4)
    assert (first.align_tokens, second.align_tokens) == (64, 64)
    hashes = [bytes([number]) for number in range(8)]
    assert second.hashes(hashes, 0, 2) == [b"\3", b"\7"]


@needs_group_hooks
def test_kept_groups_window_of_the_scheduler_and_of_a_worker_are_equal() -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    wrapped = UniformTypeKVCacheSpecs(
        block_size=BLOCK, kv_cache_specs={"a": window(), "b": window()}
    )
    assert rules(wrapped) == rules(window())
    assert groups_refusal(cache_config(wrapped)) is None


@needs_group_hooks
@pytest.mark.parametrize("mode", ["none", "all"])
def test_groups_refusal_names_the_mode_of_states(mode: str) -> None:
    reason = groups_refusal(cache_config(full_attention(), state(mode=mode)))
    assert reason is not None
    assert f"mamba_cache_mode is '{mode}'" in reason
    assert groups_refusal(cache_config(full_attention(), state())) is None


def test_groups_refusal_names_a_vllm_without_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    from kvcache.connectors.vllm.vllm_names import has_name

    has_name.cache_clear()
    monkeypatch.delattr(base, "KVConnectorTransferResults", raising=False)
    try:
        reason = groups_refusal(cache_config(full_attention(), window()))
        assert reason is not None
        assert "FullAttentionSpec, SlidingWindowSpec" in reason
        assert groups_refusal(cache_config(full_attention())) is None
    finally:
        has_name.cache_clear()


def group(needs: Needs, block_tokens: int = BLOCK, align_tokens: int = BLOCK) -> KeptGroup:
    return KeptGroup(1, (1,), needs, block_tokens, 1, align_tokens)


def reachable(kept: KeptGroup, blocks: int) -> list[int]:
    return [block for block in range(blocks) if kept.is_reachable(block)]


def test_reachable_blocks_are_those_that_some_resume_point_needs() -> None:
    assert reachable(group(Needs("window", WINDOW)), 4) == [0, 1, 2, 3]
    # A window of one block before each multiple of four blocks.
    assert reachable(group(Needs("window", BLOCK + 1), align_tokens=4 * BLOCK), 8) == [3, 7]
    # No request that resumes where a chunk ends needs that chunk.
    assert reachable(group(Needs("chunk", 4 * BLOCK)), 8) == [0, 1, 2, 4, 5, 6]
    assert reachable(group(Needs("state"), align_tokens=2 * BLOCK), 4) == [1, 3]


@pytest.mark.parametrize("needs", [Needs("window", 80), Needs("chunk", 96), Needs("state")])
def test_reachable_blocks_equal_those_of_all_resume_points(needs: Needs) -> None:
    for align_tokens in (32, 64, 96):
        needed = set()
        for end in range(align_tokens, 40 * BLOCK, align_tokens):
            first = needs.first_token(end)
            needed |= set(range(first // BLOCK, -(-end // BLOCK)) if first < end else ())
        kept = group(needs, align_tokens=align_tokens)
        assert reachable(kept, 30) == sorted(block for block in needed if block < 30)


class _NoAdapters:
    def keys(self, request: Any, keys: list[bytes]) -> list[bytes]:
        return keys

    def keeps(self, request: Any) -> bool:
        return True


def test_request_keys_distinguish_groups_and_parts_and_name_the_chain_as_parent() -> None:
    groups = kept_groups(cache_config(full_attention(), window(), window(block_tokens=64)))
    keys = RequestKeys(groups, (2, 1, 1), _NoAdapters())  # type: ignore[arg-type]
    request: Any = Request("a", 4 * BLOCK)
    first, second, *_ = request.block_hashes
    chain, small, large = groups
    assert keys.parts_of(request, chain, 0, 2) == [
        first, first + b"\0\1", second, second + b"\0\1",
    ]  # fmt: skip
    assert keys.blocks(request, chain, 0, 2) == [first, second]
    assert keys.parts_of(request, small, 1, 2) == [second + b"\1\0"]
    assert keys.parts_of(request, large, 0, 1) == [second + b"\2\0"]
    assert keys.parents(request, chain, [0, 1]) == [None, first + b"\0\1"]
    assert keys.parents(request, small, [0, 1]) == [first + b"\0\1", second + b"\0\1"]
    assert keys.parents(request, large, [0]) == [second + b"\0\1"]


def test_request_keys_without_a_chain_have_no_parents() -> None:
    groups = kept_groups(cache_config(window()))
    keys = RequestKeys(groups, (1,), _NoAdapters())  # type: ignore[arg-type]
    request: Any = SimpleNamespace(block_hashes=[b"a", b"b"])
    assert keys.parents(request, groups[0], [0, 1]) == [None, None]
    assert keys.parts_of(request, groups[0], 0, 2) == [b"a", b"b"]


def test_open_logs_the_slots_that_a_block_of_each_group_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    caplog.set_level("INFO")
    cache = cache_config(full_attention(), *[window()] * 5, hash_block_size=BLOCK)
    side = SchedulerSide(engine_config(1), cache, {})
    side.open({(0, 0): Shard((8192,) * 6, host_name(), "form")})
    side.close()
    assert caplog.messages[-1].endswith(
        "128 slots of 8192 bytes; blocks by group of layers: full: 8192 bytes for 32 tokens in 1 "
        "slot; window 64: 40960 bytes for 32 tokens in 5 slots"
    )
