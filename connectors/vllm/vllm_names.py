"""The names of vLLM that the connector uses, each with the version of vLLM that introduced it.

vLLM may change all of them without notice. A name is ``module:name`` below ``vllm``; a class is
listed with the attributes that the connector uses, whether vLLM sets them on the class or on its
instances.

Invariant: the connector uses no other name. ``tests/vllm/test_vllm_names.py`` compares this file
with the source of the connector, and with each version of vLLM that the tests run on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import CodeType
from typing import Any, Final

Version = tuple[int, int]

OLDEST_VLLM: Final[Version] = (0, 28)
"""The oldest supported version."""

NEWEST_VLLM: Final[Version] = (0, 33)
"""The newest version that the tests have run on."""

_BASE: Final = "distributed.kv_transfer.kv_connector.v1.base"
_FACTORY: Final = "distributed.kv_transfer.kv_connector.factory"
_METRICS: Final = "distributed.kv_transfer.kv_connector.v1.metrics"
_OUTPUT: Final = "v1.core.sched.output"
_SPECS: Final = "v1.kv_cache_interface"
_KV_UTILS: Final = "v1.core.kv_cache_utils"
_OFFLOAD: Final = "v1.kv_offload.base"
_OFFLOAD_CONFIG: Final = "v1.kv_offload.config"
_TIERING: Final = "v1.kv_offload.tiering.base"
_OFFLOAD_METRICS: Final = "distributed.kv_transfer.kv_connector.v1.offloading.metrics"

_NEEDED: Final[Mapping[str, str]] = {
    # What vLLM calls, in the scheduler's process and in the workers
    f"{_BASE}:KVConnectorBase_V1": """
        _get_connector_metadata _vllm_config bind_gpu_block_pool build_connector_meta
        build_connector_worker_meta build_kv_connector_stats build_prom_metrics
        get_block_ids_with_load_errors get_finished get_handshake_metadata get_kv_connector_stats
        get_num_new_matched_tokens get_required_kvcache_layout handle_preemptions
        has_pending_push_work on_new_request register_kv_caches request_finished
        requires_kv_delivery reset_cache save_kv_layer set_xfer_handshake_metadata_pp_aware shutdown
        start_load_kv take_events update_connector_output update_state_after_alloc
        wait_for_layer_load wait_for_save
    """,
    f"{_BASE}:SupportsHMA": "request_finished_all_groups",
    f"{_BASE}:KVConnectorRole": "SCHEDULER",
    f"{_BASE}:KVConnectorWorkerMetadata": "aggregate",
    f"{_BASE}:": "KVConnectorHandshakeMetadata KVConnectorMetadata",
    f"{_FACTORY}:KVConnectorFactory": "_registry register_connector",
    # Reports of a step, and the requests and blocks of the scheduler
    f"{_OUTPUT}:SchedulerOutput": "num_scheduled_tokens scheduled_cached_reqs scheduled_new_reqs",
    f"{_OUTPUT}:NewRequestData": "block_ids req_id",
    f"{_OUTPUT}:CachedRequestData": "new_block_ids req_ids resumed_req_ids",
    "v1.outputs:KVConnectorOutput": "invalid_block_ids kv_connector_worker_meta",
    "v1.core.block_pool:BlockPool": "blocks evict_blocks",
    "v1.core.kv_cache_manager:KVCacheBlocks": "get_block_ids",
    "v1.request:Request": """
        all_token_ids block_hashes kv_transfer_params lora_request num_computed_tokens
        num_prompt_tokens num_tokens request_id skip_reading_prefix_cache trace_headers
    """,
    "lora.request:LoRARequest": "adapter_id lora_int_id lora_name lora_path",
    # KV cache groups and the cache specs of layers
    f"{_SPECS}:KVCacheConfig": "kv_cache_groups num_blocks",
    f"{_SPECS}:KVCacheGroupSpec": "kv_cache_spec layer_names",
    f"{_SPECS}:KVCacheSpec": "block_size page_size_bytes",
    f"{_SPECS}:UniformTypeKVCacheSpecs": "kv_cache_specs",
    f"{_SPECS}:AttentionSpec": "num_kv_heads",
    f"{_SPECS}:FullAttentionSpec": "non_causal",
    f"{_SPECS}:SlidingWindowSpec": "extra_retained_tokens sliding_window",
    f"{_SPECS}:ChunkedLocalAttentionSpec": "attention_chunk_size",
    f"{_SPECS}:MambaSpec": "mamba_cache_mode page_size_padded",
    f"{_SPECS}:": "MLAAttentionSpec get_kv_cache_spec_kind get_kv_cache_spec_sliding_window",
    f"{_KV_UTILS}:": """
        generate_block_hash_extra_keys maybe_convert_block_hash resolve_kv_cache_block_sizes
    """,
    # KV events and metrics
    "distributed.kv_events:": "BlockRemoved BlockStored KVCacheEvent",
    f"{_METRICS}:KVConnectorStats": "aggregate data is_empty reduce reset",
    f"{_METRICS}:KVConnectorPromMetrics": """
        _counter_cls _gauge_cls _histogram_cls _labelnames observe per_engine_labelvalues
    """,
    # Configuration
    "config:": "get_current_vllm_config_or_none",
    "config:VllmConfig": """
        attention_config cache_config compilation_config device_config kv_transfer_config
        load_config model_config parallel_config scheduler_config speculative_config
        use_v2_model_runner
    """,
    "config:ModelConfig": """
        dtype get_total_num_kv_heads hf_config hf_text_config is_hybrid is_prefix_caching_supported
        max_model_len model quantization revision served_model_name trust_remote_code use_mla
    """,
    "config:CacheConfig": """
        block_size cache_dtype enable_prefix_caching prefix_caching_hash_algo prefix_match_unit
        user_specified_block_size
    """,
    "config:ParallelConfig": """
        data_parallel_size data_parallel_size_local pipeline_parallel_size tensor_parallel_size
        world_size
    """,
    "config:SchedulerConfig": "enable_chunked_prefill",
    "config:DeviceConfig": "device_type",
    "config:LoadConfig": "download_dir load_format model_loader_extra_config",
    "config:CompilationConfig": "static_forward_context",
    "config:KVTransferConfig": "kv_load_failure_policy",
    "config:KVEventsConfig": "enable_kv_cache_events",
    # The process: ranks, the device, the attention of each layer, a forward pass
    "distributed.parallel_state:": "get_pp_group get_tp_group",
    "distributed.parallel_state:GroupCoordinator": "rank_in_group",
    "distributed.kv_transfer.kv_connector.utils:": "get_kv_connector_cache_layout",
    "model_executor.model_loader:": "get_model_loader",
    "platforms:": "current_platform",
    "platforms.interface:Platform": "get_device_capability is_cuda",
    "envs:": "VLLM_USE_MODELSCOPE",
    "v1.attention.backend:AttentionBackend": "get_name",
}
"""Every supported version has these names. The connector does not run without one of them."""

_OPTIONAL: Final[Mapping[str, str]] = {
    "lora.request:LoRARequest": "is_3d_lora_weight load_inplace",
    f"{_SPECS}:KVCacheConfig": "needs_kv_cache_zeroing",
    "config:VllmConfig": "kv_events_config lora_config weight_transfer_config",
    "config:ModelConfig": """
        architecture code_revision model_arch_config model_class_overrides model_impl model_weights
        multimodal_config quantization_config
    """,
    "config.model_arch:ModelArchitectureConfig": "per_layer_overrides",
    "config:CacheConfig": "kv_cache_dtype_skip_layers",
    "config:AttentionConfig": "backend",
    "config:ParallelConfig": """
        data_parallel_external_lb data_parallel_rank_local decode_context_parallel_size
        enable_elastic_ep prefill_context_parallel_size
    """,
    "config:SchedulerConfig": "async_scheduling",
    "config:SpeculativeConfig": "draft_load_config draft_model_config",
    "config:MultiModalConfig": "mm_encoder_fp8_scale_path",
    "envs:": "VLLM_BATCH_INVARIANT",
    "forward_context:ForwardContext": "attn_metadata cudagraph_runtime_mode",
    "model_executor.layers.attention_layer_base:AttentionLayerBase": "get_attn_backend",
    "v1.attention.backends.registry:AttentionBackendEnum": "get_class",
    # vLLM's own offloading, above a secondary tier. The connector itself needs none of it.
    "config:KVTransferConfig": "engine_id",
    f"{_OFFLOAD}:": """
        Locality OffloadingCounterMetadata OffloadingGaugeMetadata OffloadingHistogramMetadata
        OffloadingMetricMetadata OffloadKey RequestOffloadingContext get_offload_group_idx
    """,
    f"{_OFFLOAD}:ReqContext": "kv_transfer_params req_id",
    f"{_OFFLOAD}:ScheduleEndContext": "new_req_ids",
    f"{_OFFLOAD}:LookupResult": "HIT MISS RETRY",
    f"{_OFFLOAD}:Medium": "STORAGE",
    f"{_OFFLOAD}:OffloadingEvent": "keys locality medium removed",
    f"{_OFFLOAD}:OffloadingSpec": "blocks_per_chunk config kv_events_config replicated_layout",
    f"{_OFFLOAD_CONFIG}:OffloadingConfig": """
        canonical_layout engine_id groups model parallel worker_kv_bytes_per_block
    """,
    f"{_OFFLOAD_CONFIG}:OffloadingGroupConfig": "layer_names tokens_per_block",
    f"{_OFFLOAD_CONFIG}:OffloadingModelConfig": "dtype name",
    f"{_OFFLOAD_CONFIG}:OffloadingCacheConfig": "tokens_per_hash",
    f"{_OFFLOAD_CONFIG}:OffloadingParallelConfig": "dcp_size pcp_size pp_size tp_size world_size",
    f"{_OFFLOAD_METRICS}:OffloadingConnectorStats": "increase_counter observe_histogram set_gauge",
    f"{_TIERING}:SecondaryTierManager": """
        _offloading_spec build_metric_definitions drain_jobs get_finished_jobs get_stats
        has_pending_work locality lookup medium on_new_request on_request_finished on_schedule_end
        shutdown submit_load submit_store take_events
    """,
    f"{_TIERING}:TransferJob": "job_id keys req_context",
    f"{_TIERING}:JobResult": "job_id success successful_keys transfer_time",
}
"""Every supported version has these names. The connector reads them with a default, or they are of
vLLM's own offloading."""

FAILED_LOADS: Final = f"{_BASE}:KVConnectorTransferResults.failed_recving"
STATES: Final = f"{_OUTPUT}:KVConnectorBlockState.boundary_state_offloads"
LIVE_TABLES: Final = f"{_OUTPUT}:KVConnectorBlockState.get_block_ids"
LAYOUTS: Final = "v1.kv_cache_layout:KVCacheLayout.BLNHC"
FIXED_HASH_SEED: Final = f"{_KV_UTILS}:resolve_none_hash_seed"
SECONDARY_TIERS: Final = f"{_TIERING}:SecondaryTierManager.cache_hit_source"
"""The newest name that `kvcache.connectors.vllm.secondary` needs."""

_LATER_NEEDED: Final[Mapping[str, Version]] = {
    # Loads and stores of several groups
    f"{_OUTPUT}:SchedulerOutput.kv_connector_block_state": (0, 29),
    STATES: (0, 29),
    LIVE_TABLES: (0, 30),
    FAILED_LOADS: (0, 30),
    f"{_BASE}:KVConnectorBase_V1.get_transfer_results": (0, 30),
    # Groups and the cache specs of layers
    f"{_SPECS}:KVCacheGroupSpec.enable_kv_transfer": (0, 29),
    f"{_SPECS}:MambaSpec.tp_replicated": (0, 29),
    f"{_SPECS}:AttentionSpec.max_tp_shards": (0, 31),
    f"{_SPECS}:KVCacheConfig.hash_block_size": (0, 32),
    # Routed experts
    "config:VllmConfig.aux_output_config": (0, 31),
    "config:AuxOutputConfig.enabled": (0, 31),
}
"""Names that the oldest supported version lacks. Without them the connector follows the rules of an
older vLLM, so a vLLM that is newer than `NEWEST_VLLM` has to have them."""

_LATER_OPTIONAL: Final[Mapping[str, Version]] = {
    LAYOUTS: (0, 29),
    FIXED_HASH_SEED: (0, 29),
    "v1.attention.backend:AttentionBackend.supported_kv_cache_layouts": (0, 29),
    "config:AttentionConfig.hisparse_config": (0, 30),
    "config:ParallelConfig.elastic_ep_max_dp_size": (0, 30),
    f"{_OFFLOAD_CONFIG}:OffloadingConfig.kv_cache_layout": (0, 29),
    f"{_OFFLOAD_CONFIG}:OffloadingGroupConfig.group_id": (0, 30),
    f"{_TIERING}:TransferJob.chunk_ids": (0, 30),
    f"{_KV_UTILS}:to_event_extra_keys": (0, 31),
    f"{_OFFLOAD}:ReqContext._offload_key_positions": (0, 31),
    f"{_OFFLOAD}:ReqContext.get_offload_key_position": (0, 31),
    "v1.kv_offload.tiering.backpressure:BackpressureDetector": (0, 31),
    f"{_TIERING}:JobResult.transfer_bytes": (0, 31),
    f"{_BASE}:KVConnectorBase_V1._cache_hit_source": (0, 32),
    "v1.metrics.cache_hit_source:CacheHitSource.HOST": (0, 32),
    "v1.metrics.cache_hit_source:CacheHitSource.EXTERNAL_UNSPECIFIED": (0, 32),
    SECONDARY_TIERS: (0, 32),
    f"{_BASE}:KVConnectorBase_V1.supports_sleep_mode": (0, 33),
    f"{_BASE}:KVConnectorBase_V1.unregister_kv_caches": (0, 33),
    f"{_BASE}:KVConnectorBase_V1.restore_kv_caches": (0, 33),
}
"""Names that the oldest supported version lacks, and without which every vLLM is supported."""

REMOVED_NAMES: Final[Mapping[str, Version]] = {
    "config:ModelConfig.enable_return_routed_experts": (0, 31),
}
"""Names that a newer supported version lacks: the first version without each."""


def _flat(names: Mapping[str, str]) -> Iterator[str]:
    for owner, of_owner in names.items():
        for name in of_owner.split():
            yield f"{owner}{'' if owner.endswith(':') else '.'}{name}"


VLLM_NAMES: Final[Mapping[str, Version]] = {
    **dict.fromkeys((*_flat(_NEEDED), *_flat(_OPTIONAL), *REMOVED_NAMES), OLDEST_VLLM),
    **_LATER_NEEDED,
    **_LATER_OPTIONAL,
}
"""All names: the first supported minor version that has each."""


@cache
def has_name(name: str) -> bool:
    """Whether the installed vLLM has a name such as those of `VLLM_NAMES`.

    The names decide, not the version: a build from source may have any version number.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(f"vllm.{module}")
    except ImportError:
        return False
    for part in path.split("."):
        if not (hasattr(found, part) or _is_set_on_instances(found, part)):
            return False
        found = getattr(found, part, None)
    return True


def _is_set_on_instances(owner: Any, name: str) -> bool:
    """Whether a class has a field of this name, or a method that names such an attribute."""
    if not isinstance(owner, type):
        return False
    if name in getattr(owner, "__dataclass_fields__", {}):
        return True
    codes = (
        getattr(method, "__code__", None)
        for kind in owner.__mro__
        for method in vars(kind).values()
    )
    return any(isinstance(code, CodeType) and name in code.co_names for code in codes)


def missing_names(version: Version | None) -> tuple[list[str], list[str]]:
    """Return the names that the installed vLLM lacks: those that the connector needs, and others.

    Args:
        version: of the installed vLLM; ``None`` if it is unknown.
    """
    newer = version is not None and version > NEWEST_VLLM
    needed = [*_flat(_NEEDED), *(_LATER_NEEDED if newer else ())]
    others = [*_flat(_OPTIONAL), *_LATER_OPTIONAL] if newer else []
    return (
        [name for name in needed if not _seems_there(name)],
        [name for name in others if not _seems_there(name)],
    )


def _seems_there(name: str) -> bool:
    """Whether the installed vLLM has a name; for a module that is not loaded, whether it exists.

    Some modules take a second to load, and not every process loads them.
    """
    module = f"vllm.{name.partition(':')[0]}"
    if module in sys.modules:
        return has_name(name)
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
