"""Small checkpoints with random weights of other architectures than the Llama of `write`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcache.cli.demo.checkpoint import SHARPNESS
from tests.support.engine.engine import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_attention_heads": 4,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip

DEEPSEEK_V2: dict[str, Any] = _COMMON | {
    "model_type": "deepseek_v2", "num_hidden_layers": 3, "num_key_value_heads": 4,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
"""MLA: one latent vector per token and layer in place of keys and values."""

GPT_OSS: dict[str, Any] = _COMMON | {
    "model_type": "gpt_oss", "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
"""Every other layer attends to a window of 64 tokens."""


def write_model(path: Path, config: dict[str, Any]) -> Path:
    """Write a bfloat16 checkpoint of a transformers config into the folder `path`; return `path`.

    As in `kvcache.cli.demo.checkpoint`, weights are of normal scale and attention is sharp: a wrong
    KV cache changes the answer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields)
    )
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            scale = 1.0 if "embed" in name else weight.shape[-1] ** -0.5
            scale *= SHARPNESS if "q_proj" in name else 1.0
            weight.data = torch.randn(weight.shape, generator=random) * scale
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def write_tokenizer(path: Path) -> Path:
    """Write a tokenizer with one word per token into the folder `path`; return `path`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(path)
    return path
