"""Print the kept groups of models as vLLM and the connector make them, without any weights.

Reads from standard input one JSON object: a name, and the configuration of the model. Writes one
JSON object: for each name, its groups. vLLM's own code makes the layers, on the meta device.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.engine.without_torchvision import stub_torchvision
from tests.support.group_hooks import kv_cache_planning

BLOCK_TOKENS = 32
RANKS = (1, 2, 4, 8)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    stub_torchvision()

    configs = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        found = {name: describe(config, Path(folder) / name) for name, config in configs.items()}
    print(json.dumps(found))


def describe(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the groups of a model, and the sizes that depend on the number of ranks."""
    import torch
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import get_model_cls, initialize_model
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    write_config(config, folder)
    engine = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        block_size=BLOCK_TOKENS,
        max_model_len=2048,
        enforce_eager=True,
        dtype="bfloat16",
    ).create_engine_config()
    # vLLM raises this type to float32 on CPUs; the figures are those of a GPU.
    engine.cache_config.mamba_ssm_cache_dtype = "auto"
    if rules := MODELS_CONFIG_MAP.get(config["architectures"][0]):
        rules.verify_and_update_config(engine)
    with set_current_vllm_config(engine):
        with torch.device("meta"), set_default_torch_dtype(torch.bfloat16):
            initialize_model(vllm_config=engine)
        current_platform.update_block_size_for_backend(engine)
        layers = get_layers_from_vllm_config(engine, AttentionLayerBase)
        specs = {
            name: layer.get_kv_cache_spec(engine)
            for name, layer in layers.items()
            if not getattr(layer, "kv_sharing_target_layer_name", None)
        }
        engine.cache_config.kv_cache_layout = engine.cache_config.kv_cache_layout or "LBNHC"
        cached = {name: spec for name, spec in specs.items() if spec}
        groups = kv_cache_planning().get_kv_cache_groups(engine, cached)
        model = get_model_cls(engine.model_config)
        states = [states_of(model, engine, ranks) for ranks in RANKS]
    return {"groups": kept(groups), "states": states}


def write_config(config: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig

    full = AutoConfig.for_model(**config).to_dict()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**full, "dtype": "bfloat16"}, default=str))


def kept(groups: list[Any]) -> list[dict[str, Any]]:
    """Return what the connector keeps of vLLM's groups, with the bytes of a block."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvcache.connectors.vllm.groups import groups_refusal, kept_groups

    config = KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups)
    refusal = groups_refusal(config)
    assert refusal is None, refusal
    return [
        {
            "kind": group.needs.kind,
            "tokens": group.needs.tokens,
            "layers": sum(len(groups[member].layer_names) for member in group.members),
            "block_tokens": group.block_tokens,
            "nbytes": sum(block_nbytes(groups[member]) for member in group.members),
        }
        for group in kept_groups(config)
    ]


def block_nbytes(group: Any) -> int:
    """Return the bytes of a block of one of vLLM's groups, without padding."""
    from vllm.v1.kv_cache_interface import MambaSpec

    from kvcache.connectors.vllm.groups import specs_of

    specs = specs_of(group.kv_cache_spec)
    if len(specs) == 1:
        specs = [specs[0]] * len(group.layer_names)
    return sum(
        spec.real_page_size_bytes if isinstance(spec, MambaSpec) else spec.unpadded_page_size_bytes
        for spec in specs
    )


def states_of(model: Any, engine: Any, ranks: int) -> dict[str, int] | None:
    """Return the bytes of a state, and the block size beside it, in an engine of `ranks` ranks."""
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec

    if not hasattr(model, "get_mamba_state_shape_from_config"):
        return None
    engine.parallel_config.tensor_parallel_size = ranks
    cache = engine.cache_config
    cache.block_size, cache.mamba_page_size_padded = BLOCK_TOKENS, None
    try:
        state = MambaSpec(
            shapes=model.get_mamba_state_shape_from_config(engine),
            dtypes=model.get_mamba_state_dtype_from_config(engine),
            block_size=-1,
        )
        current_platform.update_block_size_for_backend(engine)
    except AssertionError:  # vLLM cannot divide the model
        return None
    finally:
        engine.parallel_config.tensor_parallel_size = 1
    return {"nbytes": state.real_page_size_bytes, "block_tokens": cache.block_size}


if __name__ == "__main__":
    main()
