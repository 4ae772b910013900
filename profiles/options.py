"""A tier's options are its constructor's keyword arguments: which there are, and what they take.

Always true: a value that passes ``converted`` has the type its parameter is annotated with; text
from the environment and values from a file pass through the same check.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from kvcache import host_memory
from kvcache.eviction import POLICIES, Eviction, policy_class
from kvcache.profiles import secrets
from kvcache.profiles.errors import listed, nearest
from kvcache.sizes import FORMS, DiskSize, Size, parse_size

GIVEN_BY_THE_STACK = (
    "about",
    "block_nbytes",
    "breaker",
    "clock",
    "element_nbytes",
    "front",
    "kind",
    "name",
    "namespace",
    "piece_nbytes",
    "replica",
)
"""Keyword arguments that are not options, because a profile cannot know them."""

_WORDS: dict[object, str] = {
    Size: f"a size: {FORMS}",
    DiskSize: 'a size, such as "100GiB"',
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Eviction: f'one of {listed(POLICIES)}, or a class of yours: "pkg.mod:Class"',
}


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword argument of a tier's constructor."""

    name: str
    hint: object
    required: bool
    default: object = None  # nothing if it is required


def options_of(cls: type) -> dict[str, Option]:
    """What a profile may set for ``cls``, by name.

    Raises ValueError if its annotations are broken, or one of them would be a secret.
    """
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError) as error:
        raise ValueError(
            f"the annotations of {cls.__qualname__} cannot be read ({error})"
        ) from error
    options = {
        name: Option(name, hints.get(name), parameter.default is parameter.empty, parameter.default)
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in GIVEN_BY_THE_STACK
    }
    secrets.refuse(cls, [name for name, option in options.items() if option.hint is str])
    return options


def from_text(text: str, hint: object) -> object:
    """``text`` of an environment variable as a file would have it; unchanged if it does not fit."""
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice) == text), text)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return int(text) if hint is int else float(text) if hint is float else text
    except ValueError:
        return text


def converted(given: object, hint: object, replicas: int = 1) -> object:
    """``given`` as a ``hint``, of each of so many replicas.

    Raises ValueError that says what is allowed.
    """
    if hint is Size:
        return parse_size(given, host_memory.limit().nbytes // replicas)
    if hint is DiskSize:
        return parse_size(given)
    if hint is Eviction:
        return _eviction(given)
    if hint is float and type(given) is int:
        given = float(given)
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError(f"takes {takes(hint)}")
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        fits = any(given == choice and type(given) is type(choice) for choice in choices)
        near = nearest(given, choices)
    else:
        fits, near = type(given) is hint and hint in _WORDS, ""
    if not fits:
        raise ValueError(f"takes {takes(hint)}{near}")
    return given


def _eviction(given: object) -> str:
    """The policy's name; a class path is imported, so that what is wrong with it is said."""
    if not isinstance(given, str) or (given not in POLICIES and ":" not in given):
        raise ValueError(f"takes {takes(Eviction)}{nearest(given, POLICIES)}")
    policy_class(given)
    return given


def takes(hint: object) -> str:
    """What an option of this type can be given, in words."""
    if get_origin(hint) is Literal:
        return f"one of {listed(get_args(hint))}"
    return _WORDS.get(hint, f"nothing a profile can write: its class annotates it as {hint}")
