"""A small Llama checkpoint with random weights, for the demo and for tests.

The weights are random but of normal scale: activations neither vanish nor grow from layer to layer,
and attention is sharp enough that the KV cache decides the next token. (With vLLM's own dummy
weights it does not, and a corrupted KV cache would go unnoticed.) The same arguments write the same
files, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Queries are this many times the normal scale. Attention over thousands of random keys with scores
# of variance 1 is close to a plain mean, which hardly depends on any one key.
SHARPNESS = 4.0


def write(
    path: Path,
    *,
    layers: int = 8,
    hidden: int = 1024,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    intermediate: int = 3072,
    vocabulary: int = 8000,
    positions: int = 8192,
    seed: int = 0,
) -> Path:
    """Write `config.json` and `model.safetensors` (bfloat16) into the folder `path`; return it.

    A token takes `layers * kv_heads * head_dim * 4` bytes of KV cache: 8 KiB with the defaults.
    There is no tokenizer: start the engine with `skip_tokenizer_init=True`, and send token ids.

    Args:
        path: made if it does not exist.
        layers: of the model.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: must divide `heads`.
        head_dim: a size that the engine's attention supports (32, 64, 128, ... on CPU).
        intermediate: width of the MLP.
        vocabulary: number of token ids.
        positions: the longest context, in tokens.
        seed: of the random weights.
    """
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    random = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=random) * (scale / columns**0.5)
        return weight.to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    weights = {
        "model.embed_tokens.weight": linear(vocabulary, hidden, hidden**0.5),
        "model.norm.weight": norm(),
        "lm_head.weight": linear(vocabulary, hidden),
    }
    for layer in range(layers):
        weights |= {
            f"model.layers.{layer}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": norm(),
                "self_attn.q_proj": linear(heads * head_dim, hidden, SHARPNESS),
                "self_attn.k_proj": linear(kv_heads * head_dim, hidden),
                "self_attn.v_proj": linear(kv_heads * head_dim, hidden),
                "self_attn.o_proj": linear(hidden, heads * head_dim),
                "post_attention_layernorm": norm(),
                "mlp.gate_proj": linear(intermediate, hidden),
                "mlp.up_proj": linear(intermediate, hidden),
                "mlp.down_proj": linear(hidden, intermediate),
            }.items()
        }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
