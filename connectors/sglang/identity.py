"""Which SGLang servers share pages: the fields of the namespace.

1. SGLang's page hashes cover tokens, salts and an adapter's id, which is random in each server. The
   namespace covers everything else that changes the bytes of a page: the loaded weights, settings,
   data types, layout, page size, ranks, the releases of SGLang and torch.
2. The served name and the path of the model do not count. SGLang's own backends use the served name
   alone, and find pages of earlier weights after an update of the model behind it.
3. Pages of weights that cannot be identified are shared with no other server, nor with this one
   after a restart: the namespace then has a random part, which all ranks of a server share.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcache.connectors.sglang.host_pages import pool_fields
from kvcache.connectors.sglang.weight_updates import WeightUpdates
from kvcache.connectors.weights import UnknownWeightsError, identify, started_ns

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

log = logging.getLogger(__name__)

VARIABLE: Final = "KVCACHE_IDENTITY"
SCHEMA: Final = 1  # version of a page's bytes; a new version is a new namespace
UNSHARED: Final = "not shared"  # the field with the reason why the weights are not identified

READ_FILES: Final = frozenset(
    {"auto", "pt", "safetensors", "gguf", "bitsandbytes", "mistral", "layered", "sharded_state"}
    | {"instanttensor", "fastsafetensors"}
)
"""The values of ``--load-format`` that read files of the model's folder, and no others."""

SETTINGS: Final = (
    "device", "load_format", "model_loader_extra_config", "context_length", "model_impl",
    "model_config_parser", "json_model_override_args", "dtype", "quantization", "kv_cache_dtype",
    "qsa_indexer_dtype", "modelopt_quant", "attention_backend", "prefill_attention_backend",
    "decode_attention_backend", "enable_deterministic_inference", "rl_on_policy_target",
    "trust_remote_code", "speculative_algorithm", "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype", "mamba_ssm_dtype", "enable_int8_mamba_checkpoint",
    "enable_deepseek_v4_fp4_indexer", "prefill_kv_cache_dequant_dtype", "quantize_and_serve",
    "flashinfer_mxfp4_moe_precision", "enable_w4a4_mxfp4_megamoe", "enable_quant_communications",
    "enable_tf32_matmul", "dllm_algorithm", "forward_hooks",
)  # fmt: skip
"""Settings of SGLang's server that change the bytes of a page."""

UNREAD_FILES: Final = (
    "quantization_param_path", "modelopt_checkpoint_restore_path", "rl_quant_profile",
    "kt_weight_path", "decrypted_config_file", "decrypted_draft_config_file", "uno_lora_path",
)  # fmt: skip
"""Settings that name a file beside the weights."""

RANKS: Final = ("tp_size", "pp_size", "attn_cp_size", "dcp_size", "logical_page_size")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def identity(
    config: HiCacheStorageConfig, pool: Any, *, explicit: str, updates: WeightUpdates, token: str
) -> dict[str, object]:
    """Return the fields of the namespace, by name.

    Args:
        config: SGLang's config of the backend.
        pool: SGLang's host pool of KV.
        explicit: text that replaces the identity of the weights; "" if the user set none.
        updates: the updates of the weights of this process.
        token: the text that all ranks of this server share (`server_token`).
    """
    settings = server_settings()
    fields: dict[str, object] = {
        "engine": "sglang",
        "schema": SCHEMA,
        "sglang": _version("sglang"),
        "torch": _version("torch"),
        "device": _device(),
        "settings": {name: _plain(settings.get(name)) for name in SETTINGS},
        "ranks": {name: getattr(config, name, None) for name in RANKS},
        "mla": config.is_mla_model,
        **pool_fields(pool),
    }
    if text := explicit or os.environ.get(VARIABLE, "").strip():
        return fields | {"explicit": [text, config.model_name]}
    try:
        fields["weights"] = weights_of(settings, updates)
        if draft := settings.get("speculative_draft_model_path"):
            fields["draft weights"] = draft_weights_of(settings, str(draft))
    except UnknownWeightsError as reason:
        fields |= {UNSHARED: str(reason), "server": token}
    return fields


def server_settings() -> dict[str, Any]:
    """Return the settings in effect in this process of SGLang; none outside of a server."""
    from sglang.srt.runtime_context import get_context

    try:
        return dict(get_context().resolved_server_args_dict())
    except ValueError:  # nothing was published
        return {}


def weights_of(settings: Mapping[str, Any], updates: WeightUpdates) -> str:
    """Return the commit of the loaded weights, or a digest of their files.

    Raises:
        UnknownWeightsError: if they are not in files here, or may be others.
    """
    if not settings:
        raise UnknownWeightsError("this process has no settings of an SGLang server")
    if updates.count:
        raise UnknownWeightsError("they were updated while the engine ran")
    if reason := updates.unseen_reason():
        raise UnknownWeightsError(reason)
    for name in UNREAD_FILES:
        if settings.get(name):
            raise UnknownWeightsError(f"{name} names a file beside the weights")
    if settings.get("weight_cache_mode", "off") != "off":
        raise UnknownWeightsError("another process has loaded them (weight_cache_mode)")
    return _identify_files(
        settings, settings["load_format"], str(settings["model_path"]), settings.get("revision")
    )


def draft_weights_of(settings: Mapping[str, Any], path: str) -> str:
    """Return the commit of the weights of the draft model, or a digest of their files.

    Raises:
        UnknownWeightsError: if they are not in files here, or may be others.
    """
    own = settings.get("speculative_draft_load_format") or settings["load_format"]
    return _identify_files(settings, own, path, settings.get("speculative_draft_model_revision"))


def _identify_files(
    settings: Mapping[str, Any], load_format: object, path: str, revision: str | None
) -> str:
    if str(load_format) not in READ_FILES:
        raise UnknownWeightsError(f"load format {str(load_format)!r} reads no files of a folder")
    since_ns = started_ns()
    place = Path(path)
    if not place.exists():
        place = _snapshot(path, revision, settings.get("download_dir"), since_ns)
    found = identify(place, since_ns)
    if settings.get("trust_remote_code") and _has_remote_code(place):
        raise UnknownWeightsError("the model's code is in another repository")
    return found


def _snapshot(name: str, revision: str | None, cache: str | None, since_ns: int) -> Path:
    """Return the folder of a model in the local cache of Hugging Face."""
    if os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true"):
        raise UnknownWeightsError("ModelScope has them, and the cache of Hugging Face may not")
    from huggingface_hub import snapshot_download

    try:
        place = Path(
            snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except Exception as error:
        raise UnknownWeightsError(f"{name!r} is not in the local cache") from error
    if not _COMMIT.fullmatch(revision or ""):
        branch = place.parent.parent / "refs" / (revision or "main")
        if branch.exists() and branch.stat().st_ctime_ns > since_ns:
            # The branch moved after the start, and either commit may have been loaded.
            raise UnknownWeightsError(f"{name!r} changed after the engine started")
    return place


def _has_remote_code(place: Path) -> bool:
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        return "--" in str(config.get("auto_map") or "")
    except (OSError, ValueError, AttributeError):
        return False


def server_token() -> str:
    """Return random text that all ranks of this server share, and no other server has."""
    own = os.urandom(16).hex()
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    # The store by which the ranks found each other. No rank waits for another one here.
    store = distributed.distributed_c10d._get_default_store()
    return str(store.compare_set("kvcache/server", "", own).decode())


def log_sharing(fields: Mapping[str, object]) -> None:
    """Log how the weights were identified."""
    if reason := fields.get(UNSHARED):
        log.warning(
            "kvcache: sglang: weights not identified (%s); pages are shared with no other server, "
            "nor with this one after a restart. The option identity, or KVCACHE_IDENTITY, lets "
            "servers with the same text share pages, if they load the same weights",
            reason,
        )
    elif explicit := fields.get("explicit"):
        log.info("kvcache: sglang: identity is %r; the weight files are not read", explicit)
    else:
        log.info("kvcache: sglang: weights are %s", fields.get("weights"))


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
