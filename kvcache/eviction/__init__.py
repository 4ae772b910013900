"""Eviction policies: the shipped ones by name, and how a tier's option finds a policy class.

A tier's option of type ``Eviction`` is the name of a shipped policy, or a class path
``"package.module:Class"``. The class must be a ``Policy``, and its constructor must need nothing
but a capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import isabstract
from typing import NewType

from kvcache.eviction.arc import Arc
from kvcache.eviction.fifo import Fifo
from kvcache.eviction.gittins.policy import Gittins
from kvcache.eviction.lru import Lru
from kvcache.eviction.policy import Policy, Take
from kvcache.eviction.s3fifo import AibrixS3Fifo, S3Fifo
from kvcache.guards.calls import describe_error, raised_by_signal
from kvcache.secrets import hide_in_url

Eviction = NewType("Eviction", str)
"""The type of a tier's option ``eviction``, a policy's name or class path."""

POLICIES: dict[str, type[Policy]] = {
    "gittins": Gittins,
    "lru": Lru,
    "arc": Arc,
    "s3fifo": S3Fifo,
    "s3fifo-aibrix": AibrixS3Fifo,
    "fifo": Fifo,
}

DEFAULT = Eviction("gittins")
# The stack looks up in a lower tier only what L1 lacks: a policy would learn misleading ages there.
LOWER_TIER_DEFAULT = Eviction("lru")


def policy_class(eviction: str) -> type[Policy]:
    """Return the policy class for a name or class path; raises ValueError with the reason."""
    if eviction in POLICIES:
        return POLICIES[eviction]
    module, colon, name = eviction.partition(":")
    if not colon or "://" in eviction:  # a URL may have a password, and is not imported
        known = ", ".join(f'"{policy}"' for policy in POLICIES)
        given = hide_in_url(eviction)
        raise ValueError(f'no policy is called "{given}"; there are {known}, or "pkg.mod:Class"')
    try:
        found = getattr(import_module(module), name)
    except BaseException as error:  # a module of another package may raise anything
        if raised_by_signal(error):
            raise
        raised, text = describe_error(error)
        raise ValueError(f"cannot import {eviction} ({raised}: {text})") from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ValueError(f"{eviction} is no subclass of kvcache.eviction.Policy")
    if isabstract(found):
        raise ValueError(f"{eviction} lacks {', '.join(sorted(found.__abstractmethods__))}")
    return found


def policy_option(eviction: str) -> Callable[[int], Policy]:
    """Return a function that creates the policy of a tier's option ``eviction`` for some slots.

    Both raise ValueError with the option's value and the reason.
    """
    try:
        cls = policy_class(eviction)
    except ValueError as error:
        raise ValueError(f"eviction is {hide_in_url(eviction)!r}: {error}") from error

    def make(slots: int) -> Policy:
        try:
            return cls(slots)
        except BaseException as error:  # a class of another package may raise anything
            if raised_by_signal(error):
                raise
            raised, text = describe_error(error)
            raise ValueError(
                f"eviction is {eviction!r}: cannot make it ({raised}: {text})"
            ) from error

    return make


__all__ = [
    "DEFAULT",
    "LOWER_TIER_DEFAULT",
    "POLICIES",
    "AibrixS3Fifo",
    "Arc",
    "Eviction",
    "Fifo",
    "Gittins",
    "Lru",
    "Policy",
    "S3Fifo",
    "Take",
    "policy_class",
    "policy_option",
]
