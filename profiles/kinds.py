"""From the ``kind`` in a profile to the tier's class.

Always true: a shipped name wins over an installed one, a class path needs no registration, and
nothing but the class asked for is imported.
"""

from importlib import import_module
from importlib.metadata import entry_points

from kvcache.answers import described, from_signal
from kvcache.profiles.errors import listed, nearest
from kvcache.tier import Tier

GROUP = "kvcache.tiers"
"""Entry-point group in which an installed package names its tiers."""

KINDS: dict[str, tuple[str, str | None]] = {
    "dram": ("kvcache.tiers.dram:DramTier", None),
    "disk": ("kvcache.tiers.disk:DiskTier", None),
    "redis": ("kvcache.tiers.redis:RedisTier", "redis"),
}
"""Shipped kinds: the class, and the extra that installs what it needs."""


def known_kinds() -> list[str]:
    """The names that can be written for a kind: shipped ones, and those of installed packages."""
    return sorted({*KINDS, *entry_points(group=GROUP).names})


def tier_class(kind: str) -> type[Tier]:
    """The class that ``kind`` means. Raises ValueError that says what is wrong or allowed."""
    path, extra = _path(kind)
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except BaseException as error:  # a module of another package may raise anything
        if from_signal(error):
            raise
        if extra and isinstance(error, ImportError):
            raise ValueError(f"needs more: pip install 'kvcache[{extra}]' ({error})") from error
        raised, text = described(error)
        raise ValueError(f"cannot import {path} ({raised}: {text})") from error
    if not (isinstance(found, type) and issubclass(found, Tier)):
        raise ValueError(f"{path} is no subclass of kvcache.tier.Tier")
    if missing := sorted(found.__abstractmethods__):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return found


def _path(kind: str) -> tuple[str, str | None]:
    """The class path that ``kind`` stands for, and the extra it comes with."""
    if kind in KINDS:
        return KINDS[kind]
    if ":" in kind and "://" not in kind:  # a URL, which may have a password, is not repeated
        return kind, None
    installed = entry_points(group=GROUP)
    match sorted({point.value for point in installed if point.name == kind}):
        case [path]:
            return path, None
        case [_, *_] as paths:
            raise ValueError(f"named by several packages, for {listed(paths)}; write one of these")
    known = known_kinds()
    raise ValueError(
        f'no such kind; there are {listed(known)}, or "pkg.mod:Class"{nearest(kind, known)}'
    )
