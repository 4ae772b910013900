"""What models keep in the KV cache: layers, KV cache groups and bytes, without an engine."""

from collections.abc import Mapping

from kvcache.models.config import Model, model_of, read_model
from kvcache.models.layers import ModelGroup
from kvcache.models.presets import PRESETS

__all__ = ["PRESETS", "Model", "ModelGroup", "preset", "read_model"]


def preset(name: str, given: Mapping[str, int] | None = None) -> Model:
    """Return a model of `PRESETS`; `given` overrides numbers of it, as in `read_model`.

    Raises:
        ValueError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"no model {name!r}; kvcache knows {', '.join(PRESETS)}")
    return model_of(name, PRESETS[name], given or {})
