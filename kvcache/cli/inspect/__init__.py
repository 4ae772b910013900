"""Print what the lower tiers hold, by namespace, and verify it.

PLACE is the directory of a disk tier, redis://HOST:PORT, or s3://BUCKET/PREFIX (or gs://, az://,
file://). For a server with a password or with TLS, and for an object store with options, name a
profile. A namespace is one model with its settings, as a connector separates them. The
command only reads, and may run while engines use the tier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from kvcache.cli.inspect.contents import TierContents
from kvcache.cli.table import painter
from kvcache.secrets import redact

READERS = {
    "disk": "kvcache.cli.inspect.disk",
    "redis": "kvcache.cli.inspect.redis",
    "object": "kvcache.cli.inspect.object",
}
"""The module with `read_contents` for each kind of tier."""

SCHEMES = {
    **dict.fromkeys(("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix"), "redis"),
    **dict.fromkeys(("s3", "gs", "az", "file"), "object"),
}
"""The kind of tier for each scheme of a PLACE; without a scheme, PLACE is a directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache inspect`."""
    add = parser.add_argument
    add(
        "place",
        nargs="?",
        metavar="PLACE",
        help="a directory, or the URL of a Redis server or an object store "
        "(default: the lower tiers of the profile)",
    )
    add("--profile", help="a shipped name or a file (default: $KVCACHE_PROFILE)")
    add("--verify", action="store_true", help="read every block, and verify its checksum")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the contents; return 1 if a block is damaged, 2 if a place cannot be read."""
    try:
        found = [read(options, args.verify) for read, options in _tiers(args.place, args.profile)]
    except ValueError as error:
        print(f"inspect: {redact(str(error))}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"tiers": [contents.to_json() for contents in found]}))
    else:
        paint = painter(sys.stdout)
        print("\n\n".join(contents.text(paint) for contents in found))
    return int(any(contents.damaged for contents in found))


Options = Mapping[str, object]
ContentsReader = Callable[[Options, bool], TierContents]


def _tiers(place: str | None, profile_name: str | None) -> Iterator[tuple[ContentsReader, Options]]:
    """Yield a reader and its options for each tier. Raises ValueError for an unknown kind."""
    if place is not None:
        scheme, separator, _ = place.partition("://")
        kind = SCHEMES.get(scheme, scheme) if separator else "disk"
        yield from _readers(kind, place, {"path": place, "url": place})
        return
    from kvcache.profiles import load_profile

    profile = load_profile(profile_name)
    if not (lower := profile.tiers[1:]):
        raise ValueError(
            f"profile {profile.name} has no lower tier; `kvcache top` shows L1 of a running engine"
        )
    for row in lower:
        yield from _readers(row.kind, f"tier {row.name} of profile {profile.name}", row.options)


def _readers(kind: str, place: str, options: Options) -> Iterator[tuple[ContentsReader, Options]]:
    """Yield a reader for a tier; a disk tier has one for each replica's directory."""
    if kind not in READERS:
        raise ValueError(
            f"{place}: cannot read kind {kind!r}; kinds that can be read are {', '.join(READERS)}"
        )
    reader: ContentsReader = import_module(READERS[kind]).read_contents
    if kind == "disk":
        from kvcache.cli.inspect.disk import replicas

        yield from ((reader, each) for each in replicas(options))
    else:
        yield reader, options
