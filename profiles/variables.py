"""The environment variables that kvcache reads, and warnings about unknown ones.

Invariant: each variable with the prefix ``KVCACHE_`` is known, was set by Kubernetes, or is
named in one warning. Warnings do not contain values.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

from kvcache.replay import recorder

PREFIX = "KVCACHE_"
OVERRIDE = "KVCACHE__"
"""Prefix of the variables that set one option: ``KVCACHE__<TIER>__<OPTION>``."""

VARIABLES: Mapping[str, str] = {
    "KVCACHE_PROFILE": "the profile: a shipped name, or a path",
    "KVCACHE_IDENTITY": "replaces the digest of weights in a block's identity",
    recorder.VARIABLE: "a file to which each request is recorded, for `kvcache replay`",
    recorder.LIMIT_VARIABLE: "the largest size of that file",
    "KVCACHE_COMPILE": "`0` builds a wheel without compiled modules",
    "KVCACHE_TRACE": "for tests and benchmarks: the file of Mooncake's conversation trace",
    "KVCACHE_BENCH_LMCACHE_PYTHON": (
        "for benchmarks: the interpreter of an environment with LMCache"
    ),
}
"""Every variable of kvcache and its effect; docs/profiles.md has the same table."""

_SERVICE = re.compile(
    r"KVCACHE(_[A-Z0-9_]*[A-Z0-9])?"  # no name of a Service ends in "-", so "__" begins an option
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_PORT = re.compile(r"KVCACHE(_[A-Z0-9_]*[A-Z0-9])?_PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def set_by_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes sets this variable in every pod, for a Service named kvcache-..."""
    return bool(
        _SERVICE.fullmatch(name) or (_PORT.fullmatch(name) and _ADDRESS.match(value.lower()))
    )


def overrides(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that set an option of a tier: those with the prefix ``KVCACHE__``."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(OVERRIDE) and not set_by_kubernetes(name, value)
    }


def unknown_variables(environ: Mapping[str, str], options: Iterable[str] = ()) -> tuple[str, ...]:
    """Return a warning for each unknown variable, with the known one that it resembles.

    Args:
        environ: all variables.
        options: the variables that set an option of the profile's tiers.

    Returns:
        a sentence for each. Variables with the prefix ``KVCACHE__`` are left out: the profile's
        reader uses or refuses them.
    """
    known = [*VARIABLES, *options]
    return tuple(
        _refusal(name, known)
        for name, value in sorted(environ.items())
        if name.upper().startswith(PREFIX)
        and name not in VARIABLES
        and not name.startswith(OVERRIDE)
        and not set_by_kubernetes(name, value)
    )


def _refusal(name: str, known: Iterable[str]) -> str:
    near = _nearest(name, known)
    return f"environment variable {name}: no such variable, so it has no effect{near}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known variable that ``name`` resembles, by the part after the common prefix."""
    by_suffix = {_without_prefix(each): each for each in known}
    close = difflib.get_close_matches(_without_prefix(name), by_suffix, n=1)
    return f"; did you mean {by_suffix[close[0]]}?" if close else ""


def _without_prefix(name: str) -> str:
    return name.upper().removeprefix(PREFIX).replace("__", "_").strip("_")
