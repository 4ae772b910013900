"""The environment variables that kvcache reads, and what is said of a name that is none of them.

Always true: a variable whose name begins as ours do is known, belongs to Kubernetes, or is named in
one warning. No value of one is repeated.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

from kvcache.replay import recorder

PREFIX = "KVCACHE_"
OVERRIDE = "KVCACHE__"
"""Before the tier and the option, in a variable that sets one option."""

VARIABLES: Mapping[str, str] = {
    "KVCACHE_PROFILE": "the profile: a shipped name, or a path",
    "KVCACHE_IDENTITY": "replaces the digest of weights in a block's identity",
    recorder.VARIABLE: "a file to which each request is recorded, for `kvcache replay`",
    recorder.LIMIT_VARIABLE: "bytes of that file at most",
    "KVCACHE_COMPILE": "`0` builds a wheel without compiled modules",
    "KVCACHE_TRACE": "of tests and benchmarks: the file of Mooncake's conversation trace",
    "KVCACHE_BENCH_LMCACHE_PYTHON": "of benchmarks: the interpreter of an environment with LMCache",
}
"""Every variable of ours by name, and what it does; docs/profiles.md has the same table."""

_SERVICE = re.compile(
    r"KVCACHE(_[A-Z0-9_]*[A-Z0-9])?"  # no Service's name ends in "-": after __ is an option
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_PORT = re.compile(r"KVCACHE(_[A-Z0-9_]*[A-Z0-9])?_PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def of_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes sets this variable in each pod, because a Service is called kvcache-..."""
    return bool(
        _SERVICE.fullmatch(name) or (_PORT.fullmatch(name) and _ADDRESS.match(value.lower()))
    )


def overrides(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that set an option of a tier: those that begin with ``KVCACHE__``."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(OVERRIDE) and not of_kubernetes(name, value)
    }


def unknown(environ: Mapping[str, str], options: Iterable[str] = ()) -> tuple[str, ...]:
    """What is said of each variable that looks like ours and is not, with the nearest that is.

    Args:
        environ: all variables.
        options: the variables that set an option of the profile's tiers.

    Returns:
        A sentence for each. A ``KVCACHE__`` in capitals is not among them: a profile's reader uses
        it, or refuses it.
    """
    known = [*VARIABLES, *options]
    return tuple(
        _refusal(name, known)
        for name, value in sorted(environ.items())
        if name.upper().startswith(PREFIX)
        and name not in VARIABLES
        and not name.startswith(OVERRIDE)
        and not of_kubernetes(name, value)
    )


def _refusal(name: str, known: Iterable[str]) -> str:
    near = _nearest(name, known)
    return f"environment variable {name}: no such variable, so it has no effect{near}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """The variable that may have been meant: by what follows the prefix that all share."""
    by_rest = {_rest(each): each for each in known}
    close = difflib.get_close_matches(_rest(name), by_rest, n=1)
    return f"; did you mean {by_rest[close[0]]}?" if close else ""


def _rest(name: str) -> str:
    return name.upper().removeprefix(PREFIX).replace("__", "_").strip("_")
