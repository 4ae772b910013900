"""The options of a secondary tier: the JSON object that vLLM's configuration has for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from kvcache.profiles.errors import listed, nearest, show, show_option

LOCALITIES = ("LOCAL", "REMOTE")
"""Values of ``locality`` in vLLM: whether the tier is on this host, for filters and KV events."""


@dataclass(frozen=True, slots=True)
class SecondaryOptions:
    """The options of one secondary tier, besides those that vLLM itself reads.

    Attributes:
        profile: the name or path of a profile with the tiers below its L1; ``None`` is the profile
            that KVCACHE_PROFILE names.
        tiers: in place of ``profile``: a list of the tiers, nearest first, each with the keys of a
            ``[[tier]]`` of a profile. `open_tiers` checks it.
        enable_kv_events: whether vLLM publishes an event for each block that is stored.
        locality: where the blocks are, in vLLM's words; ``None`` if unknown.
    """

    profile: str | None = None
    tiers: object = None
    enable_kv_events: bool = False
    locality: str | None = None


OPTIONS = tuple(field.name for field in fields(SecondaryOptions))


def read_options(tier_type: str, given: Mapping[str, object]) -> SecondaryOptions:
    """Return the options in ``given``, checked.

    Args:
        tier_type: the ``type`` in vLLM's configuration, for the error.
        given: the options as written.

    Raises:
        ValueError: with every problem in ``given``.
    """
    problems: list[str] = []
    for name in given:
        if name not in OPTIONS:
            hint = nearest(name, OPTIONS)
            problems.append(f"unknown option {show(name)}; the options are {listed(OPTIONS)}{hint}")
    expected: dict[str, tuple[str, Callable[[object], bool]]] = {
        "profile": ("the name or the path of a profile", lambda value: isinstance(value, str)),
        "enable_kv_events": ("true or false", lambda value: isinstance(value, bool)),
        "locality": (listed(LOCALITIES), lambda value: value in LOCALITIES),
    }
    for name, (allowed, is_valid) in expected.items():
        value = given.get(name)
        if value is not None and not is_valid(value):
            problems.append(f"{show_option(name, value)} is not valid; write {allowed}")
    if given.get("profile") is not None and given.get("tiers") is not None:
        problems.append('has both "profile" and "tiers"; write one of them')
    if problems:
        raise ValueError(f"kvcache: secondary tier {tier_type}: {'; '.join(problems)}")
    return SecondaryOptions(**{name: given[name] for name in given if given[name] is not None})  # type: ignore[arg-type]
