"""Read the layers of a model with several kinds of them from its configuration, as vLLM does.

`FAMILIES` lists each `model_type` that is known. Every function takes the configuration of the
language model and returns an entry for each kind of layers.

Invariants: a missing number is an error that names its key, never a guess. Defaults are those
that the model's own configuration class has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvcache.models.layers import AttentionLayers, Layers, StateLayers
from kvcache.models.values import MAX_LAYERS, excerpt, number, numbers, positive
from kvcache.resume import Needs

Config = Mapping[str, Any]

_ELEMENT_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALED_ELEMENTS = 128  # elements of an index key that share a scale of 4 bytes


def _attention(config: Config, layers: int, needs: Needs) -> AttentionLayers:
    """Return layers with one key and one value for each head, of the same size."""
    heads = number(config, "num_attention_heads", 0)
    default = number(config, "hidden_size", 0) // heads if heads else None
    kv_heads = positive(config, "num_key_value_heads", heads or None)
    return AttentionLayers(layers, kv_heads, 2 * positive(config, "head_dim", default), needs)


def _total(config: Config) -> int:
    """Return the number of layers."""
    return positive(config, "num_hidden_layers", most=MAX_LAYERS)


def _kinds(config: Config, default: Callable[[int], bool], other: str) -> list[bool]:
    """Return for each layer if it is full attention.

    `layer_types` lists the layers; without it, `default` decides for the number of a layer.
    """
    total = _total(config)
    types = _listed(config, "layer_types", total)
    _check_known("layer_types", types, ("full_attention", other))
    return [kind == "full_attention" for kind in types] or [default(n) for n in range(total)]


def _listed(config: Config, key: str, total: int) -> list[Any]:
    """Return a list with an entry for each layer; an empty one if the configuration has none."""
    listed = config.get(key) or []
    if listed and (not isinstance(listed, list) or len(listed) != total):
        raise ValueError(f"{key} does not list the {total} layers of the model")
    return list(listed)


def _check_known(key: str, given: Iterable[object], known: Iterable[str]) -> None:
    if unknown := sorted({str(value) for value in given} - set(known)):
        raise ValueError(f"{key} has {excerpt(repr(unknown[0]))}; plan knows {', '.join(known)}")


def _every(config: Config, key: str, default: int) -> Callable[[int], bool]:
    """Return a rule by which the last of each `key` layers is full attention."""
    interval = positive(config, key, default)
    return lambda layer: (layer + 1) % interval == 0


def _window(config: Config, default: int | None, more: int = 0) -> Needs:
    return Needs("window", positive(config, "sliding_window", default) + more)


def _with_window(config: Config, full: Sequence[bool], window: Needs) -> list[Layers]:
    wanted = ((sum(full), Needs("all")), (len(full) - sum(full), window))
    return [_attention(config, layers, needs) for layers, needs in wanted if layers]


def _gemma2(config: Config) -> list[Layers]:
    full = _kinds(config, lambda layer: layer % 2 == 1, "sliding_attention")
    return _with_window(config, full, _window(config, 4096))


def _gemma3(config: Config) -> list[Layers]:
    config = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, **config}
    full = _kinds(config, _every(config, "sliding_window_pattern", 6), "sliding_attention")
    return _with_window(config, full, _window(config, 4096))


def _own(config: Config, full: Sequence[bool], default: int) -> Sequence[bool]:
    """Return the layers without the last ones, which use the KV cache of earlier layers."""
    shared = number(config, "num_kv_shared_layers", default)
    return full[: len(full) - shared]


def _gemma3n(config: Config) -> list[Layers]:
    config = {"head_dim": 256, **config}
    full = _kinds(config, lambda layer: (layer + 1) % 5 == 0, "sliding_attention")
    return _with_window(config, _own(config, full, 15), _window(config, 512))


def _gemma4(config: Config) -> list[Layers]:
    config = {"head_dim": 256, **config}
    full = _kinds(config, _every(config, "sliding_window_pattern", 6), "sliding_attention")
    full[-1:] = [True]  # vLLM computes the last layer with full attention
    own = _own(config, full, 0)
    everything = {**config, **_full_attention_of_gemma4(config, full.index(True))}
    return [
        _attention(everything, sum(own), Needs("all")),
        _attention(config, len(own) - sum(own), _window(config, 512)),
    ]


def _full_attention_of_gemma4(config: Config, layer: int) -> dict[str, Any]:
    """Return the keys with which a layer of full attention differs from one with a window."""
    if layers := config.get("per_layer_config"):  # as newer libraries save the configuration
        differing: dict[str, Any] = next(own for key, own in layers.items() if int(key) == layer)
        return differing
    own = {"head_dim": number(config, "global_head_dim", 512)}
    if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
        own["num_key_value_heads"] = number(config, "num_global_key_value_heads")
    return own


def _gpt_oss(config: Config) -> list[Layers]:
    total = _total(config)  # vLLM does not read layer_types here
    full = [layer % 2 == 1 for layer in range(total)]
    return _with_window({"head_dim": 64, **config}, full, _window(config, 128))


def _cohere2(config: Config) -> list[Layers]:
    full = _kinds(config, _every(config, "sliding_window_pattern", 4), "sliding_attention")
    return _with_window(config, full, _window(config, 4096, more=1))


def _llama4(config: Config) -> list[Layers]:
    """Return the layers of Llama 4: those with rotary embedding attend within chunks."""
    total = _total(config)
    every = _every(config, "no_rope_layer_interval", 4)
    rope = _listed(config, "no_rope_layers", total)
    full = [not flag for flag in rope] or [every(layer) for layer in range(total)]
    if config.get("attention_chunk_size", 8192) is None:
        full = [True] * total
    chunk = positive(config, "attention_chunk_size", 8192)
    return _with_window({"head_dim": 128, **config}, full, Needs("chunk", chunk))


def _mistral(config: Config) -> list[Layers]:
    total = _total(config)
    window = number(config, "sliding_window", 0)
    if config.get("use_sliding_window") is False:
        window = 0
    return [_attention(config, total, Needs("window", window) if window else Needs("all"))]


def _linear_attention(config: Config) -> list[Layers]:
    """Return the layers of Qwen3-Next and Qwen3.5: gated delta nets and full attention."""
    full = _kinds(config, _every(config, "full_attention_interval", 4), "linear_attention")
    key_heads, value_heads, key_dim, value_dim, kernel = numbers(
        config,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )
    states = StateLayers(
        len(full) - sum(full),
        channels=2 * key_heads * key_dim + value_heads * value_dim,
        inputs=kernel - 1,
        recurrent_elements=value_heads * key_dim * value_dim,
        recurrent_nbytes=_recurrent_nbytes(config, "mamba_ssm_dtype"),
    )
    return [_attention({"head_dim": 256, **config}, sum(full), Needs("all")), states]


def _recurrent_nbytes(config: Config, key: str, default: str | None = None) -> int | None:
    if (name := config.get(key, default)) is None:
        return None
    _check_known(key, [name], _ELEMENT_NBYTES)
    return _ELEMENT_NBYTES[name]


def _lfm2(config: Config) -> list[Layers]:
    listed = config.get("full_attn_idxs")
    full = _kinds(config, lambda layer: listed is None or layer in listed, "conv")
    channels = number(config, "conv_dim", number(config, "hidden_size"))
    states = StateLayers(
        len(full) - sum(full), channels, inputs=number(config, "conv_L_cache", 3) - 1
    )
    return [_attention(config, sum(full), Needs("all")), states]


def _jamba(config: Config) -> list[Layers]:
    total = _total(config)
    period, offset, size, kernel, expand = numbers(
        config,
        attn_layer_period=8,
        attn_layer_offset=4,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
    )
    full = sum(layer % period == offset for layer in range(total))
    channels = expand * number(config, "hidden_size")
    states = StateLayers(total - full, channels, kernel - 1, channels * size)
    return [_attention(config, full, Needs("all")), states]


def _nemotron_h(config: Config) -> list[Layers]:
    full, linear = _pattern(config)
    heads, head_dim, groups, size, kernel = numbers(
        config,
        mamba_num_heads=128,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        conv_kernel=4,
    )
    states = _mamba2(linear, heads * head_dim, groups, heads * head_dim, size, kernel)
    recurrent = _recurrent_nbytes(config, "mamba_ssm_cache_dtype", "float32")
    attention = _attention({"head_dim": 128, **config}, full, Needs("all"))
    return [attention, replace(states, recurrent_nbytes=recurrent)]


def _pattern(config: Config) -> tuple[int, int]:
    """Return the numbers of attention layers and of Mamba layers of Nemotron-H."""
    pattern = config.get("hybrid_override_pattern")
    if pattern is None:
        types = config.get("layers_block_type") or config.get("layer_types") or ()
        _check_known("layers_block_type", types, _NEMOTRON)
        pattern = "".join(_NEMOTRON[kind] for kind in types)
    _check_known("hybrid_override_pattern", pattern, "M*-E")
    if not pattern:
        raise ValueError("missing: hybrid_override_pattern")
    return pattern.count("*"), pattern.count("M")


def _expanded_mamba2(config: Config, layers: int, channels: int | None = None) -> Layers:
    """Return Mamba-2 layers of ``channels`` channels; by default, those that the config expands."""
    heads, groups, size, kernel, expand = numbers(
        config,
        mamba_n_heads=128,
        mamba_n_groups=1,
        mamba_d_state=256,
        mamba_d_conv=4,
        mamba_expand=2,
    )
    expanded = expand * number(config, "hidden_size")
    channels = expanded if channels is None else channels
    recurrent = heads * _head_dim(config, channels // heads)
    return _mamba2(layers, channels, groups, recurrent, size, kernel)


def _granite(config: Config) -> list[Layers]:
    """Return the layers of Granite 4: each is attention or Mamba 2."""
    total = _total(config)
    types = _listed(config, "layer_types", total) or _listed(config, "layers_block_type", total)
    _check_known("layer_types", types, ("attention", "mamba", *_STANDARD))
    full = sum(kind in ("attention", "full_attention") for kind in types)
    states = _expanded_mamba2(config, total - full)
    attention = [_attention(config, full, Needs("all"))] if full else []
    return [*attention, states]


def _falcon_h1(config: Config) -> list[Layers]:
    """Return the layers of Falcon-H1: each is attention and Mamba side by side."""
    total = _total(config)
    own_channels = config.get("mamba_d_ssm", 0) is not None  # null: those of the expansion
    channels = number(config, "mamba_d_ssm", 1024) if own_channels else None
    states = _expanded_mamba2(config, total, channels)
    return [_attention(config, total, Needs("all")), states]


def _head_dim(config: Config, default: int) -> int:
    """Return `mamba_d_head`, which may be "auto"."""
    return (
        default if config.get("mamba_d_head") == "auto" else number(config, "mamba_d_head", default)
    )


def _mamba2(
    layers: int, channels: int, groups: int, rows: int, size: int, kernel: int
) -> StateLayers:
    """Return layers of Mamba 2: a recurrent state of `size` elements in each of `rows` rows."""
    return StateLayers(
        layers,
        channels=channels + 2 * groups * size,
        inputs=kernel - 1,
        recurrent_elements=rows * size,
        groups=groups,
        group_channels=2 * size,
    )


def _deepseek(config: Config) -> list[Layers]:
    """Return the layers of multi-head latent attention, and of the indexers beside them."""
    total = _total(config)
    latent = number(config, "kv_lora_rank") + number(config, "qk_rope_head_dim")
    layers: list[Layers] = [AttentionLayers(total, 1, latent, Needs("all"), shared=True)]
    if config.get("index_topk") is not None:
        index = number(config, "index_head_dim", 128)
        scaled = index + index // _SCALED_ELEMENTS * 4
        layers.append(
            AttentionLayers(total, 1, scaled, Needs("all"), shared=True, element_nbytes=1)
        )
    return layers


_STANDARD = ("full_attention", "linear_attention")
_NEMOTRON = {
    "full_attention": "*",
    "attention": "*",
    "linear_attention": "M",
    "mamba": "M",
    "mlp": "-",
    "moe": "E",
}

FAMILIES: dict[str, Callable[[Config], list[Layers]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "gemma3n": _gemma3n,
    "gemma3n_text": _gemma3n,
    "gemma4": _gemma4,
    "gemma4_text": _gemma4,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "cohere2": _cohere2,
    "mistral": _mistral,
    "mixtral": _mistral,
    "qwen3_next": _linear_attention,
    "qwen3_5": _linear_attention,
    "qwen3_5_text": _linear_attention,
    "qwen3_5_moe": _linear_attention,
    "qwen3_5_moe_text": _linear_attention,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2,
    "jamba": _jamba,
    "nemotron_h": _nemotron_h,
    "granitemoehybrid": _granite,
    "falcon_h1": _falcon_h1,
    "deepseek_v32": _deepseek,
}
"""The layers of each known `model_type`."""
