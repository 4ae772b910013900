"""What is in the way here, and what to do about it: memory, tiers, versions, telemetry.

Each line is OK, WARN (works, and could be better) or FAIL (would not work), with the fix. The
profile's tiers are tried and nothing in them is changed: L1 is not made, a disk tier is not opened,
and any other tier below gets one block under a name of its own, which is removed again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.cli.doctor import disk, machine, otlp, probe, redis, versions
from kvcache.cli.doctor.result import Result, fail, ok, warn
from kvcache.cli.table import painter
from kvcache.inputs import call_within
from kvcache.secrets import redact
from kvcache.sizes import parse_size

if TYPE_CHECKING:
    from kvcache.profiles import Profile
    from kvcache.profiles.tiers import Row

WAIT_S = 30.0  # for all there is to ask of one tier
_PIP = re.compile(r"pip install '[^']+'")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `kvcache doctor` takes."""
    add = parser.add_argument
    add("--profile", help="a shipped name or a file ($KVCACHE_PROFILE)")
    add("--block-bytes", metavar="SIZE", help="of a block, for tiers that are made for one size")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings as they come; 1 if one is in the way."""
    try:
        block_nbytes = None if args.block_bytes is None else parse_size(args.block_bytes)
    except ValueError as error:
        print(f"doctor: --block-bytes is {args.block_bytes!r}: {error}", file=sys.stderr)
        return 2
    # What a tier logs while it is tried, the line about it says.
    logging.getLogger("kvcache").addHandler(logging.NullHandler())
    paint, found = painter(sys.stdout), []
    for result in checks(args.profile, block_nbytes):
        found.append(result)
        if not args.json:
            print(result.text(paint), flush=True)
    count = {
        status: sum(result.status == status for result in found) for status in ("FAIL", "WARN")
    }
    if args.json:
        print(json.dumps({"checks": [result.figures() for result in found]}))
    else:
        print(f"\n{count['FAIL']} in the way, {count['WARN']} to know of")
    return int(count["FAIL"] > 0)


def checks(profile: str | None, block_nbytes: int | None) -> Iterator[Result]:
    """All of them, in the order in which they are shown."""
    chosen, problems = _profile(profile)
    yield from versions.check(_needed(chosen) if chosen is not None else None)
    yield from problems
    yield from machine.memory_checks(chosen)
    yield machine.memlock(chosen)
    yield machine.huge_pages(chosen)
    for row in chosen.tiers[1:] if chosen is not None else ():
        yield from _lower(row, block_nbytes)
    yield from otlp.check()


def _profile(name: str | None) -> tuple[Profile | None, list[Result]]:
    from kvcache.profiles import ProfileError, load_profile

    try:
        chosen = load_profile(name)
    except ProfileError as error:
        return None, [fail("profile", problem, _fix(problem)) for problem in error.problems]
    tiers = " > ".join(f"{row.name} ({row.kind})" for row in chosen.tiers)
    fix = "correct its name, or unset it; docs/profiles.md has all variables"
    unknown = [warn("profile", one, fix) for one in chosen.unknown]
    return chosen, [ok("profile", f"{chosen.name}: {tiers} ({chosen.path})"), *unknown]


def _fix(problem: str) -> str:
    """What to do about a problem of a profile: what it says itself, if it says how to install."""
    if pip := _PIP.search(problem):
        return pip[0]
    return "correct that line or variable; docs/profiles.md has all options"


def _needed(profile: Profile) -> set[str]:
    """The extras that the profile cannot do without."""
    from kvcache.profiles.tiers import KINDS

    rows = profile.tiers
    extras = {KINDS[row.kind][1] for row in rows if row.kind in KINDS}
    if any(row.options.get("codec") == "zstd" for row in rows):
        extras.add("zstd")
    return {extra for extra in extras if extra}


def _lower(row: Row, block_nbytes: int | None) -> list[Result]:
    """What there is to say of a tier below L1. Who does not answer is left behind."""
    from kvcache.tiers.disk import DiskTier

    def check() -> list[Result]:
        if issubclass(row.cls, DiskTier):
            return list(disk.check(row))
        tried = probe.check(row, block_nbytes)
        return [tried, *(redis.check(row) if row.kind == "redis" else ())]

    def tried() -> list[Result]:
        try:
            return check()
        except BaseException as error:  # noqa: BLE001 - a tier may raise anything; Ctrl-C is not here
            why = redact(f"{type(error).__name__}: {error}")
            return [fail(row.name, f"cannot be looked at: {why}", f"see why: {row.where}")]

    try:
        return call_within(WAIT_S, tried)
    except TimeoutError:
        return [
            fail(
                row.name,
                f"no answer in {WAIT_S:.0f} s",
                f"look whether what it needs is up and can be reached: {row.where}",
            )
        ]
