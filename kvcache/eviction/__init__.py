"""Policies: in which order blocks leave a full tier, and which there are.

A tier takes an ``Eviction``: the name of a policy that is shipped, or the class path of one that is
not, ``"package.module:Class"``, which is a ``Policy`` that is made with a capacity alone.
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
"""Which policy. A tier whose option has this type takes a name or a class path in a profile."""

POLICIES: dict[str, type[Policy]] = {
    "gittins": Gittins,
    "lru": Lru,
    "arc": Arc,
    "s3fifo": S3Fifo,
    "s3fifo-aibrix": AibrixS3Fifo,
    "fifo": Fifo,
}

DEFAULT = Eviction("gittins")
BELOW = Eviction("lru")  # the default of a lower tier, which is not asked for what L1 has


def policy_class(eviction: str) -> type[Policy]:
    """The policy of this name or class path. Raises ValueError that says what is wrong."""
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
    """What makes the policy for a tier's option ``eviction``, given a number of slots.

    This and what it returns raise ValueError that names the option.
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
    "BELOW",
    "DEFAULT",
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
