"""Configurations of known models: what their `config.json` says about the KV cache.

The names are those of the published weights, without the owner. All have the data type bfloat16.
"""

from __future__ import annotations

from typing import Any


def _config(model_type: str, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "dtype": "bfloat16",
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gemma-2-9b": _config("gemma2", 42, 16, 8, head_dim=256, sliding_window=4096),
    "gemma-3-4b": _config("gemma3_text", 34, 8, 4, head_dim=256, sliding_window=1024),
    "gemma-3-12b": _config("gemma3_text", 48, 16, 8, head_dim=256, sliding_window=1024),
    "gemma-3-27b": _config("gemma3_text", 62, 32, 16, head_dim=128, sliding_window=1024),
    "gemma-3n-e4b": _config(
        "gemma3n_text", 35, 8, 2, head_dim=256, sliding_window=512, num_kv_shared_layers=15
    ),
    "gpt-oss-20b": _config("gpt_oss", 24, 64, 8, head_dim=64, sliding_window=128),
    "gpt-oss-120b": _config("gpt_oss", 36, 64, 8, head_dim=64, sliding_window=128),
    "llama-4-scout": _config("llama4_text", 48, 40, 8, head_dim=128, attention_chunk_size=8192),
    "command-r7b": _config("cohere2", 32, 32, 8, hidden_size=4096, sliding_window=4096),
    "mistral-7b-v0.1": _config("mistral", 32, 32, 8, hidden_size=4096, sliding_window=4096),
    "llama-3.1-8b": _config("llama", 32, 32, 8, hidden_size=4096),
    "qwen3-next-80b-a3b": _config("qwen3_next", 48, 16, 2, head_dim=256),
    "qwen3.5-9b": _config("qwen3_5_text", 32, 16, 4, head_dim=256, mamba_ssm_dtype="float32"),
    "qwen3.5-27b": _config(
        "qwen3_5_text",
        64,
        24,
        4,
        head_dim=256,
        linear_num_value_heads=48,
        mamba_ssm_dtype="float32",
    ),
    "lfm2-1.2b": _config(
        "lfm2", 16, 32, 8, hidden_size=2048, conv_dim=2048, full_attn_idxs=[2, 5, 8, 10, 12, 14]
    ),
    "jamba-mini": _config("jamba", 32, 32, 8, hidden_size=4096),
    "deepseek-v3": _config("deepseek_v3", 61, 128, 128, kv_lora_rank=512, qk_rope_head_dim=64),
    "deepseek-v3.2": _config(
        "deepseek_v32",
        61,
        128,
        128,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        index_topk=2048,
        index_head_dim=128,
    ),
}
