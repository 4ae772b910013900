"""Read what a model keeps in the KV cache from its `config.json`.

Invariants: a missing number is an error that names the key and the option, never a guess. A model
with layers of a kind that is not known is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcache import inputs
from kvcache.models.families import FAMILIES
from kvcache.models.layers import AttentionLayers, Layers, ModelGroup, StateLayers, groups_of
from kvcache.models.values import excerpt, number
from kvcache.resume import Needs

CONFIG_NBYTES = 16 << 20
"""The most bytes that are read of a configuration."""

ELEMENT_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
ASSUMED_DTYPE = "bfloat16"  # vLLM's choice for a model without a dtype, or with float32

# Names of the same number in different configurations: the usual one, GPT's and Falcon's.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd")
_OUTER = ("torch_dtype", "dtype", "model_type")  # keys that a language model's part may lack
_FULL = {"full_attention", "attention"}
_UNIFORM_WITHOUT_WINDOW = ("mistral", "mixtral")
_SEVERAL_KINDS = (
    "attention_chunk_size",
    "full_attention_interval",
    "full_attn_idxs",
    "hybrid_override_pattern",
    "index_topk",
    "linear_attn_config",
    "mamba_d_state",
    "ssm_state_size",
)
"""Keys of configurations of models with layers that are not attention over all tokens."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model's layers, one entry of `kinds` for those that are alike.

    `heads` is the number of query heads, 0 if it is not known. `dtype` is the model's data type.
    """

    name: str
    kinds: tuple[Layers, ...]
    heads: int = 0
    dtype: str = ASSUMED_DTYPE
    warnings: tuple[str, ...] = ()

    def groups(
        self, *, ranks: int = 1, block_tokens: int = 16, cache_nbytes: int | None = None
    ) -> tuple[ModelGroup, ...]:
        """Return the model's kept groups in an engine of `ranks` tensor-parallel ranks.

        Args:
            ranks: Tensor-parallel ranks.
            block_tokens: The engine's block size.
            cache_nbytes: Bytes of an element of the KV cache; None means the model's data type.

        Raises:
            ValueError: `ranks` cannot divide the heads or the states.
        """
        for kind in self.kinds:
            if isinstance(kind, AttentionLayers) and not kind.shared:
                self._check_heads(kind.kv_heads, ranks)
        model_nbytes = ELEMENT_NBYTES[self.dtype]
        return groups_of(
            self.kinds,
            ranks=ranks,
            block_tokens=block_tokens,
            cache_nbytes=cache_nbytes or model_nbytes,
            model_nbytes=model_nbytes,
        )

    def _check_heads(self, kv_heads: int, ranks: int) -> None:
        if self.heads % ranks or max(ranks, kv_heads) % min(ranks, kv_heads):
            heads = f"{self.heads} heads, " if self.heads else ""
            raise ValueError(
                f"{ranks} ranks cannot divide {heads}{kv_heads} KV heads: the heads must be a "
                "multiple of the ranks, and one of KV heads and ranks a multiple of the other"
            )

    def description(self) -> str:
        """Return the model's name and layers as text."""
        return f"{self.name}: {'; '.join(_description(kind) for kind in self.kinds)}"


def _description(kind: Layers) -> str:
    if isinstance(kind, StateLayers):
        return f"{kind.layers} layers with a state"
    window = {
        "all": "",
        "window": f", a window of {kind.needs.tokens:,} tokens",
        "chunk": f", chunks of {kind.needs.tokens:,} tokens",
        "state": "",
    }[kind.needs.kind]
    if kind.shared:
        what = (
            f"an index key of {kind.head_elements} bytes"
            if kind.element_nbytes
            else (f"a latent of {kind.head_elements}")
        )
        return f"{kind.layers} layers, {what} each (MLA)"
    heads = f"{kind.kv_heads} KV heads of {kind.head_elements // 2}"
    return f"{kind.layers} layers, {heads}{window}"


def read_model(path: Path | None, given: Mapping[str, int]) -> Model:
    """Read the model of `path` (a `config.json`, or a folder with one); `given` overrides it.

    `given` may have `layers`, `kv_heads`, `head_dim` and `latent_dim`.

    Raises:
        ValueError: the file is not a configuration, or numbers are missing; it lists all of them.
    """
    config: dict[str, Any] = {}
    name = "as given"
    if path is not None:
        config, name = _read(path)
    try:
        return model_of(name, config, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return the language model's part of the configuration, and the model's name."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(inputs.read_text(file, CONFIG_NBYTES))
        inputs.check_document(config)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"{file} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a model's configuration: it is not a JSON object")
    names = config.get("architectures") or config.get("model_type") or "a model"
    name = excerpt(names[0] if isinstance(names, list) else names)
    for part in ("text_config", "llm_config"):  # of models with images or audio
        if isinstance(config.get(part), dict):
            outer = {key: config[key] for key in _OUTER if key in config}
            inner = config[part]
            config = inner | {key: v for key, v in outer.items() if inner.get(key) is None}
    return config, name


def model_of(name: str, config: Mapping[str, Any], given: Mapping[str, int]) -> Model:
    """Return the model of a configuration; `given` overrides numbers of it.

    Raises:
        ValueError: numbers are missing or wrong, or a kind of layers is not known.
    """
    kind, several = str(config.get("model_type")), _several_kinds(config)
    heads = _number(config, _HEADS)
    dtype, warnings = _dtype(config)
    if kind in FAMILIES and (several or kind not in _UNIFORM_WITHOUT_WINDOW):
        if given:
            options = ", ".join(f"--{option.replace('_', '-')}" for option in given)
            raise ValueError(f"{options} cannot be set: the model has layers of several kinds")
        return Model(name, _kinds_of_family(kind, config), heads, dtype, warnings)
    if several:
        name_of_type = excerpt(repr(config.get("model_type")))
        raise ValueError(
            f"the model {several}, and plan does not know its model_type {name_of_type}; plan "
            f"knows such layers of {', '.join(FAMILIES)}"
        )
    return Model(name, (_uniform(config, given, heads),), heads, dtype, warnings)


def _kinds_of_family(family: str, config: Mapping[str, Any]) -> tuple[Layers, ...]:
    try:
        kinds = tuple(kind for kind in FAMILIES[family](config) if kind.layers)
    except (AttributeError, TypeError, LookupError, StopIteration) as error:
        raise ValueError(f"it is not a configuration of a {family} model ({error!r})") from error
    if not kinds:
        raise ValueError("the model has no layers that keep anything")
    return kinds


def _several_kinds(config: Mapping[str, Any]) -> str:
    """Return what shows that layers are not all attention over all tokens; "" if nothing does."""
    types = config.get("layer_types") or config.get("layers_block_type") or []
    types = types if isinstance(types, list) else [types]
    if other := sorted({str(kind) for kind in types} - _FULL):
        return f"has layers of {excerpt(', '.join(other))}"
    if not types and config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"has a sliding window of {excerpt(config['sliding_window'])} tokens"
    if key := next((key for key in _SEVERAL_KINDS if config.get(key)), None):
        return f"has {key}"
    return ""


def _uniform(config: Mapping[str, Any], given: Mapping[str, int], heads: int) -> AttentionLayers:
    """Return layers that are alike: attention over all tokens.

    Multi-head latent attention has one latent of a token in each layer, and every rank has it.
    """
    missing: list[str] = []

    def wanted(option: str, keys: Sequence[str], default: int = 0) -> int:
        if option in given:
            return given[option]
        found = _number(config, keys) or default
        if not found:
            missing.append(f"{keys[0]} (--{option.replace('_', '-')})")
        return found

    layers = wanted("layers", _LAYERS)
    latent_dim = given.get("latent_dim", 0)
    if not latent_dim and _number(config, ["kv_lora_rank"]):
        latent_dim = _number(config, ["kv_lora_rank"]) + _number(config, ["qk_rope_head_dim"])
    kv_heads, elements = 1, latent_dim
    if not latent_dim:
        multi_query = config.get("multi_query") and not config.get("new_decoder_architecture")
        kv_heads = wanted("kv_heads", _KV_HEADS, 1 if multi_query else heads)
        default = _number(config, _HIDDEN) // heads if heads else 0
        elements = 2 * wanted("head_dim", ["head_dim"], default)
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    return AttentionLayers(layers, kv_heads, elements, Needs("all"), shared=bool(latent_dim))


def _number(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """Return the first of `keys` that the configuration has; 0 if it has none."""
    return next((number(config, key) for key in keys if config.get(key) is not None), 0)


def _dtype(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the type of the cache's elements, as vLLM chooses it, and warnings about it."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    if dtype in ("bfloat16", "float16"):
        return dtype, ()
    if not config:
        return ASSUMED_DTYPE, ()
    model_has = f"has dtype {excerpt(dtype)}" if dtype else "has no dtype"
    return ASSUMED_DTYPE, (f"the model {model_has}; {ASSUMED_DTYPE} is assumed (--dtype)",)
