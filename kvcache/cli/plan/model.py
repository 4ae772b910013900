"""What of a model decides how large its KV cache is, read from its `config.json`.

Always true: a number that was not said is an error that names the key and the option, never a
guess; what kvcache could not keep of the model's cache is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcache import inputs
from kvcache.secrets import escape_unprintable

LIMIT = 16 << 20
"""Bytes of a configuration, at most."""
MOST = 1 << 32
"""The largest number of anything in it."""

_SHOWN = 200  # characters of a value in a message

ELEMENT_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
ASSUMED_DTYPE = "bfloat16"  # what vLLM takes where the model says nothing, or float32

# Names of one number in the configurations that are about: the usual one, GPT's and Falcon's.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd")
_FULL = {"full_attention", "attention"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's attention: of each layer alike, with one key and one value per head and token.

    With multi-head latent attention (`latent_dim` above 0) a token has one latent of so many
    elements per layer instead, and every rank has all of it.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    latent_dim: int = 0
    heads: int = 0  # of the queries; 0: not known
    dtype: str = ASSUMED_DTYPE
    warnings: tuple[str, ...] = ()

    def rank_elements(self, ranks: int) -> int:
        """Elements that one of `ranks` tensor-parallel ranks keeps of a token, in all layers.

        Raises ValueError where the heads cannot be divided so.
        """
        if self.latent_dim:
            return self.layers * self.latent_dim
        if self.heads % ranks or max(ranks, self.kv_heads) % min(ranks, self.kv_heads):
            of = f"{self.heads} heads, " if self.heads else ""
            raise ValueError(
                f"{ranks} ranks cannot divide {of}{self.kv_heads} KV heads: the heads must be a "
                "multiple of the ranks, and of KV heads and ranks one a multiple of the other"
            )
        return self.layers * 2 * max(1, self.kv_heads // ranks) * self.head_dim

    def described(self) -> str:
        """In words, with the numbers that count."""
        if self.latent_dim:
            return f"{self.name}: {self.layers} layers, a latent of {self.latent_dim} each (MLA)"
        return f"{self.name}: {self.layers} layers, {self.kv_heads} KV heads of {self.head_dim}"


def read_model(path: Path | None, given: Mapping[str, int | None]) -> Model:
    """The model of `path` (a `config.json`, or a folder with one), with what was `given` instead.

    `given` are `layers`, `kv_heads`, `head_dim` and `latent_dim`, None where they were not. Raises
    ValueError with all that is missing.
    """
    config: dict[str, Any] = {}
    name = "as given"
    if path is not None:
        config, name = _read(path)
    try:
        model = _model(name, config, {key: n for key, n in given.items() if n is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    return replace(model, warnings=(*model.warnings, *_not_kept(config)))


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The part of the configuration that is about text, and the model's name."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(inputs.read_text(file, LIMIT))
        inputs.check_document(config)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"{file} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a model's configuration: it has no names in it")
    names = config.get("architectures") or config.get("model_type") or "a model"
    name = shown(names[0] if isinstance(names, list) else names)
    for part in ("text_config", "llm_config"):  # of models that see or hear as well
        if isinstance(config.get(part), dict):
            config = {key: config[key] for key in ("torch_dtype", "dtype") if key in config} | {
                key: value for key, value in config[part].items() if value is not None
            }
    return config, name


def shown(value: object) -> str:
    """A value of a configuration in a message: one line, not endless."""
    text = escape_unprintable(str(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _model(name: str, config: Mapping[str, Any], given: Mapping[str, int]) -> Model:
    missing: list[str] = []

    def said(option: str, keys: Sequence[str], otherwise: int = 0) -> int:
        if option in given:
            return given[option]
        found = _number(config, keys) or otherwise
        if not found:
            missing.append(f"{keys[0]} (--{option.replace('_', '-')})")
        return found

    heads = _number(config, _HEADS)
    layers = said("layers", _LAYERS)
    latent_dim = given.get("latent_dim", 0)
    if not latent_dim and _number(config, ["kv_lora_rank"]):
        latent_dim = _number(config, ["kv_lora_rank"]) + _number(config, ["qk_rope_head_dim"])
    if latent_dim:
        kv_heads, head_dim = 1, latent_dim
    else:
        multi_query = config.get("multi_query") and not config.get("new_decoder_architecture")
        kv_heads = said("kv_heads", _KV_HEADS, 1 if multi_query else heads)
        own = _number(config, _HIDDEN) // heads if heads else 0
        head_dim = said("head_dim", ["head_dim"], own)
    if missing:
        raise ValueError(f"not said: {', '.join(missing)}")
    dtype, warnings = _dtype(config)
    return Model(name, layers, kv_heads, head_dim, latent_dim, heads, dtype, warnings)


def _number(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The first of `keys` that is there; 0 if none is."""
    for key in keys:
        if (value := config.get(key)) is not None:
            if type(value) is not int or value < 0:
                what = shown(repr(value))
                raise ValueError(f"{key} is {what}, and not one whole number for all layers")
            if value > MOST:
                raise ValueError(f"{key} is {value}; it is at most {MOST}")
            return value
    return 0


def _dtype(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The type of the cache's elements, as vLLM chooses it, and what is to be said about that."""
    said = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    if said in ("bfloat16", "float16"):
        return said, ()
    why = f"says {shown(said)}" if said else "does not say what the elements are"
    if not config:
        return ASSUMED_DTYPE, ()
    return ASSUMED_DTYPE, (f"the model {why}; {ASSUMED_DTYPE} is assumed (--dtype)",)


def _not_kept(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Why kvcache would find no hits with this model, as far as its configuration tells."""
    types = config.get("layer_types") or config.get("layers_block_type") or []
    types = types if isinstance(types, list) else [types]
    if other := sorted({str(kind) for kind in types} - _FULL):
        why = f"has layers of {shown(', '.join(other))}"
    elif not types and config.get("sliding_window") and config.get("use_sliding_window", True):
        why = f"has a sliding window of {shown(config['sliding_window'])} tokens"
    elif any(config.get(key) for key in ("full_attention_interval", "hybrid_override_pattern")):
        why = "has layers that are not attention"
    else:
        return ()
    keeps = "kvcache keeps full attention alone, so it may find no hits"
    return (f"the model {why}; {keeps}. The numbers are as if all of it were",)
