"""Check the installed packages against the requirements of kvcache.

Invariants: the requirements come from the metadata of the installed kvcache. No package is
imported, because importing an engine takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from platform import python_version
from typing import TYPE_CHECKING

from kvcache.cli.doctor.result import CheckResult, fail, ok, warn

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_DEVELOPMENT_EXTRAS = {"test", "docs"}
ENGINE = "engine"  # the extra that installs vLLM itself
_MODULES = {"mooncake-transfer-engine": "mooncake"}
"""The module of a package, where its name differs."""


def check(needed_extras: Collection[str] | None) -> Iterator[CheckResult]:
    """Yield a result for kvcache itself, and one for each extra that is installed or needed.

    ``needed_extras`` is None if the profile cannot be read.
    """
    try:
        version, lines = metadata.version("kvcache"), metadata.requires("kvcache") or []
    except metadata.PackageNotFoundError:
        yield warn(
            "kvcache",
            "not installed, so its requirements are not known",
            "pip install . in the checkout",
        )
        return
    extras = metadata.metadata("kvcache").get_all("Provides-Extra") or []
    by_extra = _by_extra(lines, set(extras) - _DEVELOPMENT_EXTRAS)
    index = find_spec("kvcache.index")
    compiled = ", compiled" if index and (index.origin or "").endswith(".so") else ""
    itself = f"{version}{compiled}, Python {python_version()}"
    yield _check_extra("", by_extra.pop(""), is_needed=True, prefix=itself)
    absent = []
    for extra, requirements in sorted(by_extra.items()):
        is_needed = needed_extras is not None and extra in needed_extras
        if _installed_version(requirements[0].name) or is_needed:
            yield _check_extra(extra, requirements, is_needed=is_needed)
        else:
            absent.append(extra)
    if absent:
        unneeded = ", and not needed by the profile" if needed_extras is not None else ""
        yield ok("extras", f"not installed{unneeded}: {', '.join(absent)}")


def _check_extra(
    extra: str, requirements: Sequence[Requirement], *, is_needed: bool, prefix: str = ""
) -> CheckResult:
    """Check the packages of one extra; "" is kvcache itself."""
    versions = {one: _installed_version(one.name) for one in requirements}
    present = [f"{one.name} {version}" for one, version in versions.items() if version]
    what, subject = ", ".join([*filter(None, [prefix]), *present]), extra or "kvcache"
    pip = f"pip install 'kvcache[{extra}]'" if extra else "pip install . in the checkout"
    if old := [one for one, version in versions.items() if version and not _fits(version, one)]:
        required = ", ".join(f"{one.name}{one.specifier} is required" for one in old)
        # Upgrade an engine with the tool that installed it: pip could install a build for another
        # device over it.
        fix = f"upgrade {old[0].name}" if extra == ENGINE else pip
        return fail(subject, f"{what}: {required}", fix)
    if missing := ", ".join(one.name for one, version in versions.items() if not version):
        status = fail if is_needed else warn
        return status(subject, f"{missing} not installed" + (f"; {what}" if what else ""), pip)
    return ok(subject, what)


def _by_extra(lines: Sequence[str], extras: Collection[str]) -> dict[str, list[Requirement]]:
    """Return the requirements for this machine, by extra; "" has those of every install.

    An extra without requirements is left out.
    """
    from packaging.requirements import Requirement

    by_extra: dict[str, list[Requirement]] = {"": []}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            by_extra[""].append(requirement)
            continue
        for extra in extras:
            if marker.evaluate({"extra": extra}):
                by_extra.setdefault(extra, []).append(requirement)
    return by_extra


def _installed_version(package: str) -> str:
    """Return the version of a package, or of another package that provides its module, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        module = _MODULES.get(package, package.replace("-", "_"))
        if find_spec(module) is None:  # finding its package would take a second
            return ""
        for other in metadata.packages_distributions().get(module, ()):
            return f"{metadata.version(other)}"
    return ""


def _fits(version: str, requirement: Requirement) -> bool:
    """Return whether the release that ``version`` leads to meets the requirement.

    A build from source, and a version that is not valid, count as new enough.
    """
    from packaging.version import InvalidVersion, Version

    try:
        installed = Version(version)
    except InvalidVersion:
        return True
    # The base version has no pre-release: 0.28.0rc1 has what kvcache needs of 0.28.
    return installed.is_devrelease or requirement.specifier.contains(installed.base_version)
