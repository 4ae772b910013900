"""What is installed, and whether it is what kvcache asks for.

Always true: what is asked for is read from the installed package's own metadata, and nothing is
imported, since importing an engine takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from platform import python_version
from typing import TYPE_CHECKING

from kvcache.cli.doctor.result import Result, fail, ok, warn

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OURS = {"test", "docs"}  # extras for working on kvcache
ENGINE = "engine"  # the extra that brings vLLM itself


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
    extras = metadata.metadata("kvcache").get_all("Provides-Extra") or []
    wanted = _by_extra(asked, set(extras) - _OURS)
    index = find_spec("kvcache.index")
    as_what = ", compiled" if index and (index.origin or "").endswith(".so") else ""
    said = f"{ours}{as_what}, Python {python_version()}"
    yield from _extra("", wanted.pop(""), said, True)
    absent = []
    for extra, its in sorted(wanted.items()):
        wants = needed is not None and extra in needed
        if _installed(its[0].name) or wants:
            yield from _extra(extra, its, "", wants)
        else:
            absent.append(extra)
    if absent:
        known = ", and not needed by the profile" if needed is not None else ""
        yield ok("extras", f"not installed{known}: {', '.join(absent)}")


def _extra(
    extra: str, wanted: Sequence[Requirement], before: str, needed: bool
) -> Iterator[Result]:
    found = {one: _installed(one.name) for one in wanted}
    have = [f"{one.name} {version}" for one, version in found.items() if version]
    said, subject = ", ".join([*filter(None, [before]), *have]), extra or "kvcache"
    pip = f"pip install 'kvcache[{extra}]'" if extra else "pip install . in the checkout"
    if old := [one for one, version in found.items() if version and _older(version, _oldest(one))]:
        why = ", ".join(f"{one.name} must be {_oldest(one)} or newer" for one in old)
        # An engine is upgraded in the way in which it was installed: pip by that extra might put
        # a build for another device over it.
        fix = f"upgrade {old[0].name}" if extra == ENGINE else pip
        yield fail(subject, f"{said}: {why}", fix)
    elif missing := [one.name for one, version in found.items() if not version]:
        how = fail if needed else warn
        yield how(
            subject, f"{', '.join(missing)} not installed" + (f"; {said}" if said else ""), pip
        )
    else:
        yield ok(subject, said)


def _by_extra(asked: Sequence[str], extras: Collection[str]) -> dict[str, list[Requirement]]:
    """Return the requirements that count on this machine, by extra; "" has those of every install.

    An extra without any is left out.
    """
    from packaging.requirements import Requirement

    wanted: dict[str, list[Requirement]] = {"": []}
    for requirement in map(Requirement, asked):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            wanted[""].append(requirement)
            continue
        for extra in extras:
            if marker.evaluate({"extra": extra}):
                wanted.setdefault(extra, []).append(requirement)
    return wanted


def _oldest(requirement: Requirement) -> str:
    """The oldest version that a requirement takes; empty if it takes any."""
    return next((one.version for one in requirement.specifier if one.operator == ">="), "")


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
    """Whether the release `version` is older than the release `than`.

    A build from source, and a version that is no valid one, count as new enough.
    """
    from packaging.version import InvalidVersion, Version

    try:
        installed = Version(version)
    except InvalidVersion:
        return False
    # The base has no pre-release: 0.29.0rc1 has what kvcache needs of 0.29.
    return (
        bool(than)
        and not installed.is_devrelease
        and (Version(installed.base_version) < Version(than))
    )
