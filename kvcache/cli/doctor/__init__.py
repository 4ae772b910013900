"""Check this machine for a profile: memory, tiers, versions and telemetry.

Each line is OK, WARN (works, but could be better) or FAIL (an engine would not work), with the fix.
No tier is changed: L1 is not allocated and a disk tier is not opened. Any other lower tier gets one
block in a namespace of its own, which the check removes.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvcache.cli.doctor import disk, machine, object_store, otlp, pages, probe, redis, versions
from kvcache.cli.doctor.options import DEFAULTS, CheckOptions
from kvcache.cli.doctor.result import CheckResult, fail, ok, warn
from kvcache.cli.table import painter
from kvcache.inputs import call_within
from kvcache.secrets import redact
from kvcache.sizes import parse_size

if TYPE_CHECKING:
    from kvcache.profiles import Profile
    from kvcache.profiles.tiers import Row

FURTHER_CHECKS: dict[str, Callable[[Row], Iterator[CheckResult]]] = {
    "redis": redis.check,
    "object": object_store.check,
}
"""The checks of a kind of tier after the probe."""

_PIP = re.compile(r"pip install '[^']+'")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache doctor`."""
    add = parser.add_argument
    add("--profile", help="a shipped name or a file (default: $KVCACHE_PROFILE)")
    add("--block-bytes", metavar="SIZE", help="size of a block, to check tiers that need it")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, options: CheckOptions = DEFAULTS) -> int:
    """Print each result as soon as it is known; return 1 if a check failed."""
    try:
        block_nbytes = None if args.block_bytes is None else parse_size(args.block_bytes)
    except ValueError as error:
        print(f"doctor: --block-bytes is {args.block_bytes!r}: {error}", file=sys.stderr)
        return 2
    # The result of a tier's check contains what the tier logs.
    logging.getLogger("kvcache").addHandler(logging.NullHandler())
    paint, results = painter(sys.stdout), []
    for result in checks(args.profile, block_nbytes, options):
        results.append(result)
        if not args.json:
            print(result.text(paint), flush=True)
    failures, warnings = (sum(one.status == status for one in results) for status in _COUNTED)
    if args.json:
        print(json.dumps({"checks": [result.to_json() for result in results]}))
    else:
        print(f"\n{_count(failures, 'failure')}, {_count(warnings, 'warning')}")
    return int(failures > 0)


_COUNTED = ("FAIL", "WARN")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def checks(
    profile_name: str | None, block_nbytes: int | None, options: CheckOptions = DEFAULTS
) -> Iterator[CheckResult]:
    """Run all checks, and yield their results in the order in which they are printed."""
    profile, results = _load(profile_name)
    yield from versions.check(_needed_extras(profile) if profile is not None else None)
    yield from results
    yield from machine.memory_checks(profile, options)
    yield machine.locked_memory(profile)
    yield pages.huge_page_check(profile, options)
    yield pages.numa_check(options)
    for row in profile.tiers[1:] if profile is not None else ():
        yield from _lower_tier(row, block_nbytes, options)
    yield from otlp.check(timeout_s=options.otlp_timeout_s)


def _load(name: str | None) -> tuple[Profile | None, list[CheckResult]]:
    """Load the profile; return None for an invalid one, and the results of its check."""
    from kvcache.profiles import ProfileError, load_profile

    try:
        profile = load_profile(name)
    except ProfileError as error:
        return None, [fail("profile", problem, _fix(problem)) for problem in error.problems]
    tiers = " > ".join(f"{row.name} ({row.kind})" for row in profile.tiers)
    fix = "correct its name, or unset it; docs/profiles.md lists all variables"
    unknown = [warn("profile", one, fix) for one in profile.unknown]
    return profile, [ok("profile", f"{profile.name}: {tiers} ({profile.path})"), *unknown]


def _fix(problem: str) -> str:
    """Return the pip command that a profile's problem contains, else general advice."""
    if pip := _PIP.search(problem):
        return pip[0]
    return "correct that line or variable; docs/profiles.md lists all options"


def _needed_extras(profile: Profile) -> set[str]:
    """Return the extras that the tiers of ``profile`` need."""
    from kvcache.profiles.tiers import KINDS

    rows = profile.tiers
    extras = {KINDS[row.kind][1] for row in rows if row.kind in KINDS}
    if any(row.options.get("codec") == "zstd" for row in rows):
        extras.add("zstd")
    return {extra for extra in extras if extra}


def _lower_tier(row: Row, block_nbytes: int | None, options: CheckOptions) -> list[CheckResult]:
    """Check a lower tier. A tier that exceeds the timeout is left in its thread."""
    from kvcache.tiers.disk import DiskTier

    def results() -> list[CheckResult]:
        try:
            if issubclass(row.cls, DiskTier):
                return list(disk.check(row, options))
            found = [probe.check(row, block_nbytes, options)]
            further = FURTHER_CHECKS.get(row.kind)
            return [*found, *(further(row) if further else ())]
        except BaseException as error:  # noqa: BLE001 - a tier's class may raise anything
            cause = redact(f"{type(error).__name__}: {error}")
            return [fail(row.name, f"the check failed: {cause}", f"find the cause: {row.where}")]

    try:
        return call_within(options.tier_timeout_s, results)
    except TimeoutError:
        return [
            fail(
                row.name,
                f"no answer in {options.tier_timeout_s:g} s",
                f"check that its disk or server runs and can be reached: {row.where}",
            )
        ]
