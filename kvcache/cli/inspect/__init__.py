"""What the tiers below L1 hold, by namespace: who may find it, how much, and whether it is whole.

PLACE is the directory of a disk tier, or redis://HOST:PORT; a server that asks for more than that
is found through a profile. A namespace is one model with its settings, as a connector keeps them
apart. Reads only, and may run while engines use the tier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from kvcache.cli.inspect.contents import Contents
from kvcache.cli.table import painter
from kvcache.secrets import redact

READERS = {
    "disk": ("kvcache.cli.inspect.disk", "path"),
    "redis": ("kvcache.cli.inspect.redis", "url"),
}
"""By the tier's kind: the module whose `contents(options, verify)` reads one, and the option of the
tier that says its place."""

SCHEMES = dict.fromkeys(("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix"), "redis")
"""The kind that a place of this scheme is; without one it is a directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `kvcache inspect` takes."""
    add = parser.add_argument
    add(
        "place",
        nargs="?",
        metavar="PLACE",
        help="a directory or a Redis URL (else the profile's)",
    )
    add("--profile", help="a shipped name or a file ($KVCACHE_PROFILE)")
    add("--verify", action="store_true", help="read every block, and check it")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is there; 1 if a block is damaged, 2 for a place that cannot be read."""
    try:
        found = [read(options, args.verify) for read, options in _tiers(args.place, args.profile)]
    except ValueError as error:
        print(f"inspect: {redact(str(error))}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"tiers": [contents.figures() for contents in found]}))
    else:
        paint = painter(sys.stdout)
        print("\n\n".join(contents.text(paint) for contents in found))
    return int(any(contents.damaged for contents in found))


Options = Mapping[str, object]
Reader = Callable[[Options, bool], Contents]


def _tiers(place: str | None, profile: str | None) -> Iterator[tuple[Reader, Options]]:
    """What to read, and how. Raises ValueError for what nothing here can read."""
    if place is not None:
        scheme, mark, _ = place.partition("://")
        kind = SCHEMES.get(scheme, scheme) if mark else "disk"
        yield from _parts(kind, _reader(kind, place), {READERS[kind][1]: place})
        return
    from kvcache.profiles import load_profile

    chosen = load_profile(profile)
    if not (lower := chosen.tiers[1:]):
        raise ValueError(
            f"profile {chosen.name} has no tier below L1, and L1 ends with its engine; "
            "`kvcache top` shows one that runs"
        )
    for row in lower:
        reader = _reader(row.kind, f"tier {row.name} of profile {chosen.name}")
        yield from _parts(row.kind, reader, row.options)


def _parts(kind: str, reader: Reader, options: Options) -> Iterator[tuple[Reader, Options]]:
    """A place once, or once for each replica that has a directory there."""
    if kind == "disk":
        from kvcache.cli.inspect.disk import replicas

        yield from ((reader, each) for each in replicas(options))
    else:
        yield reader, options


def _reader(kind: str, what: str) -> Reader:
    if kind not in READERS:
        raise ValueError(
            f"{what}: of kind {kind!r}; kinds that can be read are {', '.join(READERS)}"
        )
    reader: Reader = import_module(READERS[kind][0]).contents
    return reader
