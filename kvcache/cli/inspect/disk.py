"""Read what the directory of a disk tier holds. Changes nothing, even if an engine has it open."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from kvcache.cli.inspect.contents import TierContents
from kvcache.cli.inspect.frames import verify as verify_frames


def replicas(options: Mapping[str, object]) -> list[Mapping[str, object]]:
    """Return options for each directory that replicas of one engine have below a path."""
    from kvcache.tiers.disk.replicas import replica_directories
    from kvcache.tiers.disk.safe_open import expand_path

    path = expand_path(str(options["path"]))
    try:
        folders = [path / name for _, name in sorted(replica_directories(path).items())]
    except OSError:  # read_contents raises the cause
        return [options]
    return [
        {**options, "path": str(folder)}
        for folder in folders
        if folder == path or (folder / "records").exists()
    ]


def read_contents(options: Mapping[str, object], verify: bool) -> TierContents:
    """Count the blocks; with ``verify`` also read them, and verify their checksums.

    Raises:
        ValueError: there is no disk tier, or it cannot be read.
    """
    from kvcache.tiers.disk.lock_file import find_owner
    from kvcache.tiers.disk.reader import DiskReader
    from kvcache.tiers.disk.safe_open import expand_path

    path = expand_path(str(options["path"]))
    with closing(DiskReader(path)) as reader:
        geometry = reader.geometry
        contents = TierContents(
            str(path),
            "disk",
            {
                "slots": geometry.slots,
                "slot_nbytes": geometry.slot_nbytes,
                "blocks": len(reader),
                "open_in_process": find_owner(path),
            },
        )
        for record in reader:
            contents.namespace_of(record.key).add_block(record.nbytes)
        for name, description in reader.descriptions().items():
            contents.describe(name, description)

        def missing_reason(key: bytes) -> str:
            return "unreadable" if reader.is_unchanged(key) else "changed"

        if verify:
            keys = [record.key for record in reader]
            verify_frames(reader, keys, geometry.slot_nbytes, contents, missing_reason)
        return contents
