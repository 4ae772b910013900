"""Identity: the fields that two engines must share before one finds the other's blocks.

1. vLLM's block hashes cover tokens, salts, images and an adapter's name. The namespace covers
   everything else that changes the bytes of a block: the loaded weights, the configuration, data
   types, attention, layout, ranks, the releases of vLLM and torch. docs/identity.md lists its
   parts, and the settings that it leaves out with the reasons.
2. It depends on the loaded files, not on their place: the same files at another path, or on another
   host, are the same model.
3. Weights that cannot be identified are shared with no other process: the namespace then has a
   random part.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcache.connectors.vllm.identity.releases import release_fields
from kvcache.connectors.vllm.identity.specs import group_fields
from kvcache.connectors.vllm.vllm_names import FIXED_HASH_SEED, has_name
from kvcache.connectors.weights import UnknownWeightsError, identify, started_ns

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheConfig
    from vllm.config.load import LoadConfig
    from vllm.config.model import ModelConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

VARIABLE: Final = "KVCACHE_IDENTITY"
SCHEMA: Final = 2  # version of a block's bytes; a new version is a new namespace
RANDOM: Final = "random"  # the seed of hashes that differ between processes
UNSHARED: Final = "not shared"  # the field with the reason why the weights are not identified

_LOADERS = "vllm.model_executor.model_loader."
_READ_FILES = {"default_loader", "sharded_state_loader", "bitsandbytes_loader", "gguf_loader"}
"""vLLM's loaders that read files of a folder, by module."""

_NO_SETTINGS = {"_name_or_path", "transformers_version"}
"""Names in a model's configuration that change no byte. Releases have fields of their own."""

_MEDIA = (
    "language_model_only", "mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate",
    "video_pruning_method", "mm_encoder_attn_backend", "mm_encoder_attn_dtype",
    "mm_device_do_normalize", "mm_hasher_algorithm",
)  # fmt: skip
"""Settings that change images and sounds before the model, and that vLLM does not hash."""


def identity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> dict[str, object]:
    """Return the fields of the namespace, by name."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    fields: dict[str, object] = {
        "schema": SCHEMA,
        "config": _config(model),
        "length": model.max_model_len,  # some models choose their rotary embedding by it
        "architecture": str(getattr(model, "architecture", None)),
        "classes": str(getattr(model, "model_class_overrides", None)),
        "implementation": str(getattr(model, "model_impl", None)),
        "code": str(getattr(model, "code_revision", None)),
        "load format": str(vllm_config.load_config.load_format),
        "loader": str(vllm_config.load_config.model_loader_extra_config),  # which files it reads
        "dtype": str(model.dtype),
        "quantization": [str(model.quantization), str(getattr(model, "quantization_config", None))],
        "media": settings_of(getattr(model, "multimodal_config", None), _MEDIA),
        "cache dtype": cache.cache_dtype,
        "hash": cache.prefix_caching_hash_algo,
        "hash seed": _hash_seed(cache),
        "batch invariant": os.environ.get("VLLM_BATCH_INVARIANT", "0"),
        "groups": [group_fields(group) for group in kv_cache_config.kv_cache_groups],
        "ranks": [parallel.pipeline_parallel_size, parallel.tensor_parallel_size],
        **release_fields(vllm_config),
    }
    draft = drafter(vllm_config)
    if draft is not None:
        fields["draft config"] = _config(draft)
    if text := os.environ.get(VARIABLE, "").strip():
        named = getattr(model, "model_weights", "") or model.model
        return fields | {"explicit": [text, named, model.revision]}
    try:
        _require_identifiable(vllm_config)
        fields["weights"] = weights_of(model, vllm_config.load_config)
        if draft is not None:
            own = getattr(vllm_config.speculative_config, "draft_load_config", None)
            fields["draft weights"] = weights_of(draft, own or vllm_config.load_config)
    except UnknownWeightsError as reason:
        fields |= {UNSHARED: str(reason), "process": os.urandom(16).hex()}
    return fields


def log_sharing(fields: Mapping[str, object], *, lower: bool) -> None:
    """Log how the weights were identified. ``lower`` is whether there is a tier below L1."""
    if fields.get("hash seed") == RANDOM and lower:
        log.warning(
            "kvcache: identity: vLLM's block hashes begin with random bytes (PYTHONHASHSEED is not "
            "set); blocks are shared with no other process, nor with this engine after a restart"
        )
    if (reason := fields.get(UNSHARED)) and lower:
        log.warning(
            "kvcache: identity: weights not identified (%s); blocks are shared with no other "
            "process, nor with this engine after a restart. KVCACHE_IDENTITY=TEXT lets engines "
            "with the same text share blocks, if they load the same weights",
            reason,
        )
    elif reason:
        log.info("kvcache: identity: weights not identified (%s)", reason)
    elif explicit := fields.get("explicit"):
        log.info(
            "kvcache: identity: %s is %r (environment variable); the weight files are not read",
            VARIABLE,
            explicit,
        )
    elif lower:
        log.info("kvcache: identity: weights are %s", fields.get("weights"))


def _hash_seed(cache: CacheConfig) -> str | None:
    """Return the seed of vLLM's block hashes: `RANDOM`, or ``None`` for the one that is fixed."""
    if (seed := os.environ.get("PYTHONHASHSEED")) is not None:
        return seed
    # vLLM's `resolve_none_hash_seed` chooses it. Of hashes that are easy to collide it is secret.
    secret = cache.prefix_caching_hash_algo.startswith("xxhash")
    fixed = has_name(FIXED_HASH_SEED) and not secret
    return None if fixed else RANDOM


def drafter(vllm_config: VllmConfig) -> ModelConfig | None:
    """Return the draft model, if it has weights of its own; a block has its layers' KV, too."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    return None if draft is vllm_config.model_config else draft


def weights_of(model: ModelConfig, load: LoadConfig) -> str:
    """Return the commit of the weights of ``model``, or a digest of their files.

    Raises:
        UnknownWeightsError: if they are not in files here, or an unknown loader reads them.
    """
    from vllm.model_executor.model_loader import get_model_loader

    if getattr(model, "model_weights", ""):
        raise UnknownWeightsError("they come from an object store")
    try:
        module = type(get_model_loader(load)).__module__
    except Exception as error:
        raise UnknownWeightsError(f"load format {load.load_format!r}: {error}") from error
    if not module.startswith(_LOADERS) or module.removeprefix(_LOADERS) not in _READ_FILES:
        raise UnknownWeightsError(f"load format {load.load_format!r} reads no files of a folder")
    place = Path(model.model)
    if place.exists():
        return identify(place, started_ns())
    from huggingface_hub import snapshot_download
    from vllm import envs

    if envs.VLLM_USE_MODELSCOPE:
        raise UnknownWeightsError("ModelScope has them, and the cache of Hugging Face may not")
    try:
        place = Path(
            snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=load.download_dir,
                local_files_only=True,
            )
        )
    except Exception as error:
        raise UnknownWeightsError(f"{model.model!r} is not in the local cache") from error
    found = identify(place, started_ns())
    configured = getattr(model.hf_config, "_commit_hash", None)
    if found.startswith("commit ") and configured and found != f"commit {configured}":
        # The branch moved after the engine's start, and either commit may have been loaded.
        raise UnknownWeightsError(f"{model.model!r} was at {configured} and is now at {found}")
    return found


def kernels(vllm_config: VllmConfig) -> str:
    """Return the attention backends and the device of a worker, which compute its blocks."""
    from vllm.platforms import current_platform

    layers = vllm_config.compilation_config.static_forward_context.values()
    asked = [getattr(layer, "get_attn_backend", None) for layer in layers]
    found = {backend().get_name() for backend in asked if backend is not None}
    return f"{','.join(sorted(found))} {current_platform.get_device_capability()}"


def _require_identifiable(vllm_config: VllmConfig) -> None:
    """Raise UnknownWeightsError if the files do not determine what the engine computes with."""
    model = vllm_config.model_config
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise UnknownWeightsError("weight_transfer_config replaces them while the engine runs")
    media = getattr(model, "multimodal_config", None)
    if getattr(media, "mm_encoder_fp8_scale_path", None):
        raise UnknownWeightsError("mm_encoder_fp8_scale_path names a file beside the weights")
    auto_map = getattr(model.hf_config, "auto_map", None) or {}
    if model.trust_remote_code and "--" in str(auto_map):
        raise UnknownWeightsError("the model's code is in another repository")


def _config(model: ModelConfig) -> str:
    """Return the model's configuration after all overrides, without `_NO_SETTINGS`."""
    return json.dumps(_settings(json.loads(model.hf_config.to_json_string(use_diff=False))))


def _settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _settings(each) for name, each in value.items() if name not in _NO_SETTINGS}
    return [_settings(each) for each in value] if isinstance(value, list) else value


def settings_of(config: object, names: Sequence[str]) -> list[str]:
    """Return some settings of a config, by name; none if there is no config."""
    return [] if config is None else [f"{name}={getattr(config, name, None)}" for name in names]
