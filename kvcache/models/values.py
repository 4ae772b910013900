"""Numbers of a model's configuration, checked. An error names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcache.secrets import escape_unprintable

MAX_NUMBER = 1 << 32
"""The largest number that a configuration or an option may have."""
MAX_LAYERS = 1 << 16
"""The most layers that a configuration may have."""

_MESSAGE_LENGTH = 200  # characters of a value in a message


def number(
    config: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_NUMBER
) -> int:
    """Return a whole number of the configuration; without it, the default.

    Raises:
        ValueError: it is not a whole number up to `most`, or missing without a default.
    """
    if (value := config.get(key)) is None:
        if default is None:
            raise ValueError(f"missing: {key}")
        return default
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {excerpt(repr(value))}, not one whole number for all layers")
    if value > most:
        raise ValueError(f"{key} is {value}; it is at most {most}")
    return value


def positive(
    config: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_NUMBER
) -> int:
    """Return a `number` that is above 0.

    Raises:
        ValueError: it is not such a number, or missing without a default.
    """
    if not (value := number(config, key, default, most)):
        raise ValueError(f"{key} is 0; it must be above 0")
    return value


def numbers(config: Mapping[str, Any], **defaults: int) -> list[int]:
    """Return a `positive` number for each key, in order."""
    return [positive(config, key, default) for key, default in defaults.items()]


def excerpt(value: object) -> str:
    """Return a value of a configuration for a message: one line of limited length."""
    text = escape_unprintable(str(value))
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[: _MESSAGE_LENGTH - 3]}..."
