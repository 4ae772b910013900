"""What the directory of a disk tier holds. Changes nothing there, whoever has it open."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from kvcache.cli.inspect.contents import Contents
from kvcache.cli.inspect.frames import verify as verify_frames


def replicas(options: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The options for each directory that replicas of one engine have at a path."""
    from kvcache.tiers.disk.places import location
    from kvcache.tiers.disk.replicas import directories

    path = location(str(options["path"]))
    try:
        found = [path / name for _, name in sorted(directories(path).items())]
    except OSError:  # reading it says why
        return [options]
    return [
        {**options, "path": str(each)}
        for each in found
        if each == path or (each / "records").exists()
    ]


def contents(options: Mapping[str, object], verify: bool) -> Contents:
    """Count the blocks, and with `verify` read them all and hold them to their checksums.

    Raises ValueError where there is no disk tier to read.
    """
    from kvcache.tiers.disk.locks import holder
    from kvcache.tiers.disk.places import location
    from kvcache.tiers.disk.reader import Reader

    path = location(str(options["path"]))
    with closing(Reader(path)) as reader:
        geometry = reader.geometry
        found = Contents(
            str(path),
            "disk",
            {
                "slots": geometry.slots,
                "slot_nbytes": geometry.slot_nbytes,
                "blocks": len(reader),
                "open_in_process": holder(path),
            },
        )
        for record in reader:
            held = found.of(record.key)
            held.blocks += 1
            held.nbytes += record.nbytes

        for name, about in reader.about().items():
            found.describe(name, about)

        def why(key: bytes) -> str:
            return "unreadable" if reader.stands(key) else "changed"

        if verify:
            keys = [record.key for record in reader]
            verify_frames(reader, keys, geometry.slot_nbytes, found, why)
        return found
