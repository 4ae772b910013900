"""Read the size of a model's KV cache from its `config.json`.

Always true: a missing number is an error that names the key and the option, never a guess. A part
of the cache that kvcache cannot store is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcache import inputs
from kvcache.secrets import escape_unprintable

CONFIG_NBYTES = 16 << 20
"""The most bytes that are read of a configuration."""
MAX_NUMBER = 1 << 32
"""The largest number that a configuration or an option may have."""

_MESSAGE_LENGTH = 200  # characters of a value in a message

ELEMENT_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
ASSUMED_DTYPE = "bfloat16"  # vLLM's choice for a model without a dtype, or with float32

# Names of the same number in different configurations: the usual one, GPT's and Falcon's.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd")
_FULL = {"full_attention", "attention"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's attention, equal in all layers: one key and one value for each head and token.

    With multi-head latent attention (`latent_dim` above 0), a token has one latent of that many
    elements in each layer instead, and every rank has all of it. `heads` is the number of query
    heads, 0 if it is not known.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    latent_dim: int = 0
    heads: int = 0
    dtype: str = ASSUMED_DTYPE
    warnings: tuple[str, ...] = ()

    def rank_elements(self, ranks: int) -> int:
        """Return the elements of a token in one of `ranks` tensor-parallel ranks, in all layers.

        Raises:
            ValueError: `ranks` cannot divide the heads.
        """
        if self.latent_dim:
            return self.layers * self.latent_dim
        if self.heads % ranks or max(ranks, self.kv_heads) % min(ranks, self.kv_heads):
            heads = f"{self.heads} heads, " if self.heads else ""
            raise ValueError(
                f"{ranks} ranks cannot divide {heads}{self.kv_heads} KV heads: the heads must be a "
                "multiple of the ranks, and one of KV heads and ranks a multiple of the other"
            )
        return self.layers * 2 * max(1, self.kv_heads // ranks) * self.head_dim

    def description(self) -> str:
        """Return the model's name and sizes as text."""
        if self.latent_dim:
            return f"{self.name}: {self.layers} layers, a latent of {self.latent_dim} each (MLA)"
        return f"{self.name}: {self.layers} layers, {self.kv_heads} KV heads of {self.head_dim}"


def read_model(path: Path | None, given: Mapping[str, int | None]) -> Model:
    """Read the model of `path` (a `config.json`, or a folder with one); `given` overrides it.

    `given` has `layers`, `kv_heads`, `head_dim` and `latent_dim`, each a number or None.

    Raises:
        ValueError: the file is not a configuration, or numbers are missing; it lists all of them.
    """
    config: dict[str, Any] = {}
    name = "as given"
    if path is not None:
        config, name = _read(path)
    try:
        model = _model(name, config, {key: n for key, n in given.items() if n is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    return replace(model, warnings=(*model.warnings, *_unsupported(config)))


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
            config = {key: config[key] for key in ("torch_dtype", "dtype") if key in config} | {
                key: value for key, value in config[part].items() if value is not None
            }
    return config, name


def excerpt(value: object) -> str:
    """Return a value of a configuration for a message: one line of limited length."""
    text = escape_unprintable(str(value))
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[: _MESSAGE_LENGTH - 3]}..."


def _model(name: str, config: Mapping[str, Any], given: Mapping[str, int]) -> Model:
    missing: list[str] = []

    def number(option: str, keys: Sequence[str], default: int = 0) -> int:
        if option in given:
            return given[option]
        found = _number(config, keys) or default
        if not found:
            missing.append(f"{keys[0]} (--{option.replace('_', '-')})")
        return found

    heads = _number(config, _HEADS)
    layers = number("layers", _LAYERS)
    latent_dim = given.get("latent_dim", 0)
    if not latent_dim and _number(config, ["kv_lora_rank"]):
        latent_dim = _number(config, ["kv_lora_rank"]) + _number(config, ["qk_rope_head_dim"])
    if latent_dim:
        kv_heads, head_dim = 1, latent_dim
    else:
        multi_query = config.get("multi_query") and not config.get("new_decoder_architecture")
        kv_heads = number("kv_heads", _KV_HEADS, 1 if multi_query else heads)
        default = _number(config, _HIDDEN) // heads if heads else 0
        head_dim = number("head_dim", ["head_dim"], default)
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    dtype, warnings = _dtype(config)
    return Model(name, layers, kv_heads, head_dim, latent_dim, heads, dtype, warnings)


def _number(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """Return the first of `keys` that the configuration has; 0 if it has none."""
    for key in keys:
        if (value := config.get(key)) is not None:
            if type(value) is not int or value < 0:
                text = excerpt(repr(value))
                raise ValueError(f"{key} is {text}, not one whole number for all layers")
            if value > MAX_NUMBER:
                raise ValueError(f"{key} is {value}; it is at most {MAX_NUMBER}")
            return value
    return 0


def _dtype(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the type of the cache's elements, as vLLM chooses it, and warnings about it."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    if dtype in ("bfloat16", "float16"):
        return dtype, ()
    if not config:
        return ASSUMED_DTYPE, ()
    model_has = f"has dtype {excerpt(dtype)}" if dtype else "has no dtype"
    return ASSUMED_DTYPE, (f"the model {model_has}; {ASSUMED_DTYPE} is assumed (--dtype)",)


def _unsupported(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a warning if the configuration shows that kvcache may find no hits."""
    types = config.get("layer_types") or config.get("layers_block_type") or []
    types = types if isinstance(types, list) else [types]
    if other := sorted({str(kind) for kind in types} - _FULL):
        model_has = f"has layers of {excerpt(', '.join(other))}"
    elif not types and config.get("sliding_window") and config.get("use_sliding_window", True):
        model_has = f"has a sliding window of {excerpt(config['sliding_window'])} tokens"
    elif any(config.get(key) for key in ("full_attention_interval", "hybrid_override_pattern")):
        model_has = "has layers that are not attention"
    else:
        return ()
    effect = "kvcache stores full attention only, so it may find no hits"
    return (f"the model {model_has}; {effect}. The numbers assume full attention in all layers",)
