"""Constructs vLLM's scheduler for a simulated model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm")

from tests.support.played_memory import layer_name
from tests.support.played_models import LONGEST, PlayedModel
from tests.support.played_ranks import Copying

CONNECTOR = {
    "kv_connector": "KVCacheConnector",
    "kv_connector_module_path": "kvcache.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


@dataclass(frozen=True)
class Play:
    """How an engine runs.

    Attributes:
        ahead: steps that are built before the report of the first of them. The scheduler is then
            vLLM's async one, but for several pipeline ranks under the first model runner.
        second_runner: whether the workers are vLLM's second model runner.
        copying: how copies run.
        room: blocks of the engine, as a multiple of those of the longest request.
        budget: tokens of a step.
        slots: of L1, as a multiple of the parts of the longest request.
        events: vLLM's `--kv-events-config`.
    """

    ahead: int = 0
    second_runner: bool = False
    copying: Copying = field(default_factory=Copying)
    room: float = 2.0
    budget: int = 64
    slots: float = 2.0
    events: Mapping[str, Any] | None = None


def write_config(folder: Path) -> Path:
    """Write what vLLM reads of a checkpoint to construct its config."""
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def open_scheduler(model: PlayedModel, play: Play, folder: Path, *, connected: bool) -> Any:
    """Return vLLM's scheduler, with or without the connector; `folder` has the config."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = _config(model, play, folder, connected=connected)
    groups = [
        KVCacheGroupSpec([layer_name(group.index, n) for n in range(group.layers)], spec)
        for group, spec in zip(model.groups, model.specs(), strict=True)
    ]
    groups[-1].is_eagle_group = model.eagle
    longest = sum(-(-LONGEST // group.block_tokens) for group in model.groups)
    blocks = 1 + len(groups) * (1 + model.drafts) + int(play.room * longest)
    config.cache_config.num_gpu_blocks = blocks
    cache = KVCacheConfig(blocks, [], groups)
    size, hash_size = kv_cache_utils.resolve_kv_cache_block_sizes(cache, config)
    if hasattr(kv_cache_utils, "resolve_cache_hit_alignment_tokens"):  # from vLLM 0.32 on
        cache.hash_block_size = hash_size
        cache.cache_hit_alignment_tokens = kv_cache_utils.resolve_cache_hit_alignment_tokens(
            cache, config, size, hash_size
        )
    kind = AsyncScheduler if config.scheduler_config.async_scheduling else Scheduler
    with set_current_vllm_config(config), runner_chosen(play):
        scheduler = kind(
            config, cache, StructuredOutputManager(config), size, hash_size, log_stats=True
        )
    assert scheduler.use_v2_model_runner == play.second_runner
    return scheduler


@contextmanager
def runner_chosen(play: Play) -> Iterator[None]:
    """Have vLLM's config name the runner that is played. vLLM reads the variable at each use."""
    runner = str(int(play.second_runner))
    with mock.patch.dict(os.environ, {"VLLM_USE_V2_MODEL_RUNNER": runner}):
        yield


def _config(model: PlayedModel, play: Play, folder: Path, *, connected: bool) -> Any:
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "model": str(folder), "skip_tokenizer_init": True, "max_model_len": 2 * LONGEST,
        "block_size": model.block_tokens, "enable_prefix_caching": True,
        "max_num_batched_tokens": play.budget, "max_num_seqs": 6,
        "kv_transfer_config": CONNECTOR if connected else None,
    }  # fmt: skip
    if play.events is not None:
        arguments["kv_events_config"] = KVEventsConfig(**play.events)
    if model.drafts:
        arguments["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": model.drafts,
            "prompt_lookup_max": 2, "prompt_lookup_min": 1,
        }  # fmt: skip
    config = EngineArgs(**arguments).create_engine_config()
    config.scheduler_config.async_scheduling = bool(play.ahead) and (
        model.pipeline == 1 or play.second_runner
    )
    config.scheduler_config.max_num_scheduled_tokens = play.budget
    config.parallel_config.pipeline_parallel_size = model.pipeline
    config.parallel_config.tensor_parallel_size = model.tensor
    config.parallel_config.world_size = model.pipeline * model.tensor
    if any(group.kind == "state" for group in model.groups):
        config.cache_config.mamba_cache_mode = "align"
        config.cache_config.mamba_block_size = max(g.block_tokens for g in model.groups)
    config.cache_config.prefix_match_unit = model.match_unit
    if model.eagle:
        config.speculative_config.method = "eagle"
        # Without a connector, vLLM 0.33 would hash the token after a block too, and would not drop
        # the last block of a hit.
        config.speculative_config.disable_lookahead_block_hashes = True
    if play.copying.is_async:
        name_device(config)
    return config


def name_device(config: Any) -> None:
    """Have vLLM's config name a device: the connector refuses some engines on one."""
    config.device_config.device_type = "cuda"
