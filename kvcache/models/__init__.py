"""What models keep in the KV cache: layers, kept groups and bytes, without an engine."""

from collections.abc import Mapping
from pathlib import Path

from kvcache.models.config import Model, model_of, read_model
from kvcache.models.layers import ModelGroup
from kvcache.models.presets import PRESETS

__all__ = ["PRESETS", "Model", "ModelGroup", "find_model", "preset", "read_model"]


def find_model(name: str, given: Mapping[str, int] | None = None) -> Model:
    """Return the model of a `config.json` or of its folder, or a model of `PRESETS`.

    Args:
        name: A path, or a name in `PRESETS`. A path that exists has precedence.
        given: Overrides numbers of the model, as in `read_model`.

    Raises:
        ValueError: `name` is neither (the message lists the names), or the file does not describe
            a model.
    """
    path = Path(name)
    if name in PRESETS and not path.exists():
        return preset(name, given)
    try:
        return read_model(path, given or {})
    except ValueError as error:
        if path.exists():
            raise
        raise ValueError(f"{error}; known models: {', '.join(PRESETS)}") from error


def preset(name: str, given: Mapping[str, int] | None = None) -> Model:
    """Return a model of `PRESETS`; `given` overrides numbers of it, as in `read_model`.

    Raises:
        ValueError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"no model {name!r}; kvcache knows {', '.join(PRESETS)}")
    return model_of(name, PRESETS[name], given or {})
