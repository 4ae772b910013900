"""The options of the backend, in ``--hicache-storage-backend-extra-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvcache.profiles.errors import listed, nearest

OPTIONS: Final = ("profile", "tiers", "identity")
"""The options of this backend; :class:`StorageOptions` says what each one takes."""

FACTORY_OPTIONS: Final = ("backend_name", "module_path", "class_name", "interface_v1")
"""Options that SGLang's factory reads from the same object."""

CONTROLLER_OPTIONS: Final = (
    "prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys", "tp_lcm_size",
)  # fmt: skip
"""Options that SGLang's cache controller reads, and usually removes before it calls the backend."""


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """The checked options.

    Attributes:
        profile: a shipped profile by name, or a path to a TOML file; ``None`` is the one that
            KVCACHE_PROFILE names.
        tiers: instead of a profile: a table for each tier, as ``[[tier]]`` in a profile.
        identity: text that replaces the identity of the weights; "" if it was not set.
    """

    profile: str | None = None
    tiers: tuple[Mapping[str, Any], ...] | None = None
    identity: str = ""


def read_options(given: Mapping[str, Any] | None) -> StorageOptions:
    """Return the options in SGLang's extra config.

    Raises:
        ValueError: with every problem.
    """
    given = given or {}
    problems = [
        f"{name}: no such option; the options are {listed(OPTIONS)}{nearest(name, OPTIONS)}"
        for name in given
        if name not in (*OPTIONS, *FACTORY_OPTIONS, *CONTROLLER_OPTIONS)
    ]
    if not given.get("interface_v1"):
        problems.append("interface_v1 must be 1: this backend reads and fills SGLang's host pool")
    profile, tiers = given.get("profile"), given.get("tiers")
    if profile is not None and tiers is not None:
        problems.append("profile and tiers exclude each other")
    if not (profile is None or (isinstance(profile, str) and profile)):
        problems.append(f"profile is {profile!r}; it takes a name or a path of a profile")
    if not (tiers is None or _is_list_of_tables(tiers)):
        problems.append('tiers takes a list of objects, such as [{"name": "disk", "kind": "disk"}]')
    identity = given.get("identity", "")
    if not isinstance(identity, str):
        problems.append(f"identity is {identity!r}; it takes a text")
    if problems:
        raise ValueError(f"--hicache-storage-backend-extra-config: {'; '.join(problems)}")
    return StorageOptions(profile, None if tiers is None else tuple(tiers), identity.strip())


def _is_list_of_tables(tiers: object) -> bool:
    return isinstance(tiers, list) and bool(tiers) and all(isinstance(each, dict) for each in tiers)
