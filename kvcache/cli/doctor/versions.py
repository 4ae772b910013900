"""What is installed, and whether it is what kvcache asks for.

Always true: what is asked for is read from the installed package's own metadata, and nothing is
imported, since importing an engine takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from platform import python_version
from typing import NamedTuple

from kvcache.cli.doctor.result import Result, fail, ok, warn

_REQUIREMENT = re.compile(
    r"""([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;.*extra\s*==\s*["']([\w-]+)["'])?"""
)
_OURS = {"test", "docs"}  # extras for working on kvcache
ENGINE = "engine"  # the extra that brings vLLM itself


class Requirement(NamedTuple):
    """A package that kvcache asks for, with which extra, and since which version."""

    package: str
    at_least: str
    extra: str


def check(needed: Collection[str] | None) -> Iterator[Result]:
    """One result for what is always needed, and one for every extra that is here or `needed`.

    None: what is needed is not known, since the profile cannot be read.
    """
    try:
        ours, asked = metadata.version("kvcache"), metadata.requires("kvcache") or []
    except metadata.PackageNotFoundError:
        yield warn(
            "kvcache",
            "not installed, so what it needs is not known here",
            "pip install . in the checkout",
        )
        return
    wanted = [_parsed(line) for line in asked]
    index = find_spec("kvcache.index")
    as_what = ", compiled" if index and (index.origin or "").endswith(".so") else ""
    said = f"{ours}{as_what}, Python {python_version()}"
    yield from _extra("", [one for one in wanted if not one.extra], said, True)
    absent = []
    for extra in sorted({one.extra for one in wanted if one.extra} - _OURS):
        its = [one for one in wanted if one.extra == extra]
        wants = needed is not None and extra in needed
        if _installed(its[0].package) or wants:
            yield from _extra(extra, its, "", wants)
        else:
            absent.append(extra)
    if absent:
        known = ", and not needed by the profile" if needed is not None else ""
        yield ok("extras", f"not installed{known}: {', '.join(absent)}")


def _extra(
    extra: str, wanted: Sequence[Requirement], before: str, needed: bool
) -> Iterator[Result]:
    found = {one: _installed(one.package) for one in wanted}
    have = [f"{one.package} {version}" for one, version in found.items() if version]
    said, subject = ", ".join([*filter(None, [before]), *have]), extra or "kvcache"
    pip = f"pip install 'kvcache[{extra}]'" if extra else "pip install . in the checkout"
    if old := [one for one, version in found.items() if version and _older(version, one.at_least)]:
        why = ", ".join(f"{one.package} must be {one.at_least} or newer" for one in old)
        # An engine is upgraded in the way in which it was installed: pip by that extra might put
        # a build for another device over it.
        fix = f"upgrade {old[0].package}" if extra == ENGINE else pip
        yield fail(subject, f"{said}: {why}", fix)
    elif missing := [one.package for one, version in found.items() if not version]:
        how = fail if needed else warn
        yield how(
            subject, f"{', '.join(missing)} not installed" + (f"; {said}" if said else ""), pip
        )
    else:
        yield ok(subject, said)


def _parsed(line: str) -> Requirement:
    match = _REQUIREMENT.match(line)
    assert match, line
    since = re.search(r">=\s*([\d.]+)", match[2])
    return Requirement(match[1], since[1] if since else "", match[3] or "")


def _installed(package: str) -> str:
    """The version of a package, also where another one brings its module; empty if none does."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        module = package.replace("-", "_")
        for other in metadata.packages_distributions().get(module, ()):
            return f"{metadata.version(other)}"
    return ""


def _older(version: str, than: str) -> bool:
    """Whether a release is older. A build from source is taken at its word."""
    return bool(than) and "dev" not in version and _numbers(version) < _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[\d.]*\d", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
