"""The options of a tier: the keyword arguments of its constructor, and the values they accept.

Invariant: ``convert`` returns a value of the type that the parameter is annotated with. Text of the
environment and values of a file pass the same check.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from kvcache import host_memory
from kvcache.eviction import POLICIES, Eviction, policy_class
from kvcache.lower.caller import TierCaller
from kvcache.profiles import secrets
from kvcache.profiles.errors import listed, nearest
from kvcache.sizes import FORMS, DiskSize, Size, parse_size

STACK_ARGUMENTS = (
    "about",
    "block_nbytes",
    "clock",
    "element_nbytes",
    "front",
    "kind",
    "name",
    "nodes",
    "replica",
)
"""Keyword arguments that the stack passes. They are no options of a profile."""

LOWER_TIER_ARGUMENTS = ("breaker", "namespace", "piece_nbytes")
"""Keyword arguments of a ``TierCaller`` that are no options. Your own tier may use these names."""

_TYPE_TEXTS: dict[object, str] = {
    Size: f"a size: {FORMS}",
    DiskSize: 'a size, such as "100GiB"',
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Eviction: f'one of {listed(POLICIES)}, or a class of your own: "pkg.mod:Class"',
}


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword argument of a tier's constructor. ``hint`` is its annotation."""

    name: str
    hint: object
    required: bool
    default: object = None  # undefined if required


def options_of(cls: type) -> dict[str, Option]:
    """Return the options of ``cls`` by name.

    Raises:
        ValueError: if its annotations cannot be read, or an option would hold a secret.
    """
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError) as error:
        raise ValueError(
            f"the annotations of {cls.__qualname__} cannot be read ({error})"
        ) from error
    passed = {*STACK_ARGUMENTS, *(LOWER_TIER_ARGUMENTS if issubclass(cls, TierCaller) else ())}
    options = {
        name: Option(name, hints.get(name), parameter.default is parameter.empty, parameter.default)
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in passed
    }
    secrets.refuse_secret_options(
        cls, [name for name, option in options.items() if option.hint is str]
    )
    return options


def parse_text(text: str, hint: object) -> object:
    """Parse ``text`` of a variable as a ``hint``; return it unchanged if that fails."""
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice) == text), text)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return int(text) if hint is int else float(text) if hint is float else text
    except ValueError:
        return text


def convert(given: object, hint: object, replicas: int = 1) -> object:
    """Convert ``given`` to the type ``hint``. Shares of memory are divided by ``replicas``.

    Raises:
        ValueError: with the allowed values.
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
        raise ValueError(f"takes {allowed_values(hint)}")
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        fits = any(given == choice and type(given) is type(choice) for choice in choices)
        near = nearest(given, choices)
    else:
        fits, near = type(given) is hint and hint in _TYPE_TEXTS, ""
    if not fits:
        raise ValueError(f"takes {allowed_values(hint)}{near}")
    return given


def _eviction(given: object) -> str:
    """Return the policy's name. A class path is imported, so that its errors appear at start."""
    if not isinstance(given, str) or (given not in POLICIES and ":" not in given):
        raise ValueError(f"takes {allowed_values(Eviction)}{nearest(given, POLICIES)}")
    policy_class(given)
    return given


def allowed_values(hint: object) -> str:
    """Describe the values that an option of the type ``hint`` accepts."""
    if get_origin(hint) is Literal:
        return f"one of {listed(get_args(hint))}"
    return _TYPE_TEXTS.get(hint, f"nothing a profile can write: its class annotates it as {hint}")
