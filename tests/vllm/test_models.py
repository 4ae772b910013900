"""kvcache.models counts what vLLM and the connector make of the same configurations."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.models import PRESETS
from kvcache.models.config import model_of
from kvcache.models.layers import ModelGroup
from tests.support.engine.model_groups import BLOCK_TOKENS, RANKS
from tests.support.group_hooks import needs_group_hooks

pytestmark = [pytest.mark.engine, needs_group_hooks]
ROOT = Path(__file__).parents[2]

CPU_LACKS = {"deepseek-v3.2"}  # vLLM computes its sparse attention on GPUs only
MORE = {
    # Lists in place of rules, other shapes, and every family without a preset.
    "gemma-3-listed": {
        **PRESETS["gemma-3-4b"],
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
    },
    "gemma-4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 512,
        "num_kv_shared_layers": 0,
    },
    "gemma-4-shared-heads": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "num_kv_shared_layers": 6,
    },
    "gemma-4-saved": {  # as transformers 5 saves it
        "model_type": "gemma4_text",
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "per_layer_config": {
            "05": {"head_dim": 512, "num_key_value_heads": 2},
            "11": {"head_dim": 512, "num_key_value_heads": 2},
        },
    },
    "llama-4-listed": {
        **PRESETS["llama-4-scout"],
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 64,
    },
    "qwen3-next-defaults": {
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "nemotron-h-8b": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "granite-4.0-h-small": {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "layer_types": ["attention" if n in (5, 15, 25, 35) else "mamba" for n in range(40)],
        "mamba_d_state": 128,
    },
    "falcon-h1-7b": {
        "model_type": "falcon_h1",
        "num_hidden_layers": 44,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_size": 3072,
        "mamba_d_ssm": 3072,
        "mamba_n_heads": 24,
        "mamba_d_state": 256,
    },
}
CONFIGS = {name: config for name, config in PRESETS.items() if name not in CPU_LACKS} | MORE
ARCHITECTURES = {
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "jamba": "JambaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mistral": "MistralForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}


def for_vllm(config: dict[str, Any]) -> dict[str, Any]:
    """Add what vLLM needs to make the layers, and what lets it make them without memory."""
    more: dict[str, Any] = {"architectures": [ARCHITECTURES[config["model_type"]]]}
    if config["model_type"] == "gemma3n_text":
        more["activation_sparsity_pattern"] = [0.0] * config["num_hidden_layers"]
    if config["model_type"] == "lfm2":
        more |= {"block_dim": 2048, "block_ff_dim": 4096, "block_ffn_dim_multiplier": 1.0}
    return config | more


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What vLLM makes of each configuration, computed in a process of its own."""
    given = json.dumps({name: for_vllm(config) for name, config in CONFIGS.items()})
    program = [sys.executable, "-m", "tests.support.engine.model_groups"]
    done = subprocess.run(
        program, check=False, input=given, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_of_a_configuration_are_those_that_the_connector_keeps(
    name: str, made: dict[str, Any]
) -> None:
    expected = made[name]["groups"]
    block_tokens = min(BLOCK_TOKENS, *(group["block_tokens"] for group in expected))
    groups = model_of(name, CONFIGS[name], {}).groups(block_tokens=block_tokens)
    assert [described(group) for group in groups] == expected


def described(group: ModelGroup) -> dict[str, Any]:
    return {
        "kind": group.needs.kind,
        "tokens": group.needs.tokens,
        "layers": group.layers,
        "block_tokens": group.block_tokens,
        "nbytes": group.block_nbytes,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_states_on_several_ranks_equal_those_of_vllm(name: str, made: dict[str, Any]) -> None:
    model = model_of(name, CONFIGS[name], {})
    for ranks, state in zip(RANKS, made[name]["states"], strict=True):
        if state is None:
            continue
        try:
            groups = model.groups(ranks=ranks, block_tokens=BLOCK_TOKENS)
        except ValueError:
            continue
        (group,) = [group for group in groups if group.needs.kind == "state"]
        assert group.rank_block_nbytes == group.layers * state["nbytes"]
        assert group.block_tokens == state["block_tokens"]


def test_group_of_deepseek_with_indexers_has_the_bytes_of_the_specs() -> None:
    """vLLM makes these layers on GPUs only, from these specs."""
    import torch
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    latent = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    index = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=132, dtype=torch.uint8)
    model = model_of("deepseek-v3.2", PRESETS["deepseek-v3.2"], {})
    for ranks in RANKS:
        (group,) = model.groups(ranks=ranks, block_tokens=64)
        assert group.block_nbytes == 61 * (latent.page_size_bytes + index.page_size_bytes)
