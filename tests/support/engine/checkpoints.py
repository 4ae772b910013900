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

_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256}
WINDOW = 64
"""Tokens of every sliding window and attention chunk here: two blocks of `engine.BLOCK`."""

GPT_OSS: dict[str, Any] = _GROUPED | {
    "model_type": "gpt_oss", "num_hidden_layers": 4,
    "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
"""Every other layer attends to a window."""

GEMMA_2: dict[str, Any] = _GROUPED | {
    "model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": WINDOW,
    "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "embedding_scale": 0.03,
}  # fmt: skip
"""Every other layer attends to a window."""

GEMMA_3: dict[str, Any] = _GROUPED | {
    "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": WINDOW,
    "query_pre_attn_scalar": 32, "embedding_scale": 0.03,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}  # fmt: skip
"""Five layers with a window to one without: vLLM makes six groups of one layer."""

GEMMA_3N: dict[str, Any] = _GROUPED | {
    "model_type": "gemma3n_text", "num_hidden_layers": 10, "num_kv_shared_layers": 5,
    "sliding_window": WINDOW, "tie_word_embeddings": True, "embedding_scale": 0.03,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32,
    "laurel_rank": 16, "activation_sparsity_pattern": None,
}  # fmt: skip
"""The last five layers use the KV cache of the fourth and fifth."""

COHERE_2: dict[str, Any] = _GROUPED | {
    "model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "tie_word_embeddings": True,
    "embedding_scale": 0.3,
}  # fmt: skip
"""Three layers with a window to one without."""

LLAMA_4: dict[str, Any] = _GROUPED | {
    "model_type": "llama4_text", "num_hidden_layers": 4, "intermediate_size_mlp": 256,
    "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
    "attention_chunk_size": WINDOW, "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
}  # fmt: skip
"""Three layers attend to the current chunk."""

MISTRAL: dict[str, Any] = _GROUPED | {
    "model_type": "mistral", "num_hidden_layers": 4, "sliding_window": WINDOW,
}  # fmt: skip
"""Every layer attends to a window: no group needs all blocks."""

LFM_2: dict[str, Any] = _GROUPED | {
    "model_type": "lfm2", "num_hidden_layers": 4, "conv_L_cache": 4,
    "conv_dim": 128, "conv_bias": False, "block_dim": 128, "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True, "embedding_scale": 0.1,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
}  # fmt: skip
"""Three short convolutions, of the width that every vLLM supports: a small state each."""

_GATED_DELTA_NET: dict[str, Any] = _GROUPED | {
    "head_dim": 256,
    "num_hidden_layers": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip

QWEN_3_NEXT: dict[str, Any] = _GATED_DELTA_NET | {
    "model_type": "qwen3_next", "num_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
"""Three layers of linear attention: a state each, as large as the keys and values of 96 tokens."""

QWEN_3_5: dict[str, Any] = _GATED_DELTA_NET | {"model_type": "qwen3_5_text"}
"""The same without experts."""

SLOW_DECAY = -3.0
"""Logarithm of the decay of linear attention. At random, some states would last for few tokens."""

HYBRIDS: dict[str, dict[str, Any]] = {
    "gpt-oss": GPT_OSS, "gemma-2": GEMMA_2, "gemma-3": GEMMA_3, "gemma-3n": GEMMA_3N,
    "cohere2": COHERE_2, "llama-4": LLAMA_4, "mistral": MISTRAL, "lfm2": LFM_2,
    "qwen3-next": QWEN_3_NEXT, "qwen3.5": QWEN_3_5,
}  # fmt: skip
"""Models with several KV cache groups, or with one that does not keep all blocks."""


def write_model(path: Path, config: dict[str, Any]) -> Path:
    """Write a bfloat16 checkpoint of a transformers config into the folder `path`; return `path`.

    As in `kvcache.cli.demo.checkpoint`, weights are of normal scale and attention is sharp: a wrong
    KV cache changes the answer. Where a model multiplies its embeddings, or reads logits off them,
    `embedding_scale` makes them smaller: else it would repeat each token, whatever the KV cache.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    embedding_scale = fields.pop("embedding_scale", 1.0)
    settings = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the vectors: biases, decays, attention sinks
        model = AutoModelForCausalLM.from_config(settings)
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data.fill_(SLOW_DECAY)
        elif weight.dim() >= 2:
            scale = embedding_scale if "embed" in name else weight.shape[-1] ** -0.5
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
