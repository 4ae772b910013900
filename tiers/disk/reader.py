"""What a disk tier holds, read from outside: also while an engine has the tier open.

Always true here:

* Nothing is written, made or locked, and space that others count on is not taken.
* A block is given only if its record stayed as it was while it was read. The tier clears a record
  before it writes to the slot, so such a block is whole.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcache.process import bind_to_process
from kvcache.tier import Tier
from kvcache.tiers.disk import namespace_file
from kvcache.tiers.disk.record_file import PAGE, Record, read_geometry, read_record, read_records
from kvcache.tiers.disk.safe_open import open_directory, open_file


class DiskReader(Tier):
    """A tier that has what a disk tier's directory had when this was opened, and takes nothing.

    Args:
        path: the directory.

    Attributes:
        geometry: bytes of a slot, and how many slots there are.

    Raises:
        ValueError: where there is no disk tier of this version, or it is not ours to read.
    """

    def __init__(self, path: Path) -> None:
        self._files: list[int] = []
        try:
            folder = open_directory(path.absolute(), make=False)
            self._files.append(folder)
            self._folder, self._path = folder, path
            self._record_file = self._open(folder, "records", path)
            self._block_file = self._open(folder, "blocks", path, os.O_DIRECT)
            geometry = read_geometry(self._record_file)
            space = os.fstat(self._block_file).st_size
            if geometry is None or geometry.slot_nbytes not in range(PAGE, space + 1, PAGE):
                raise ValueError(f"{str(path)!r} has no disk tier that this version can read")
            self.geometry = geometry
            self._records = {
                record.key: record for record in sorted(read_records(self._record_file, geometry))
            }
            self._memory = mmap.mmap(-1, geometry.slot_nbytes)
        except (OSError, OverflowError) as error:  # a slot may be larger than any memory
            self.close()
            raise ValueError(f"cannot read a disk tier at {str(path)!r}: {error}") from error
        except ValueError:
            self.close()
            raise
        bind_to_process(self)

    def _open(self, folder: int, name: str, path: Path, flags: int = 0) -> int:
        """Open to read; past the page cache, which the tier's own writes go past, where it can."""
        try:
            file = open_file(folder, name, path, os.O_RDONLY | flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            file = open_file(folder, name, path, os.O_RDONLY)
        self._files.append(file)
        return file

    def __iter__(self) -> Iterator[Record]:
        """The records, oldest first; of two with one key the newer one."""
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self._records for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        return [self._load(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    def _load(self, key: bytes, buffer: memoryview) -> int:
        record = self._records.get(key)
        if record is None or record.nbytes > len(buffer):
            return 0
        pages = memoryview(self._memory)[: -(-record.nbytes // PAGE) * PAGE]
        try:
            got = os.preadv(self._block_file, [pages], record.slot * self.geometry.slot_nbytes)
        except OSError:
            got = 0
        if got < record.nbytes or not self.is_unchanged(key):
            return 0
        buffer[: record.nbytes] = pages[: record.nbytes]
        return record.nbytes

    def descriptions(self) -> dict[str, str]:
        """The description of each namespace, by its hex; none where they cannot be read."""
        try:
            return namespace_file.read(self._folder, self._path)["about"]
        except (OSError, ValueError):
            return {}

    def is_unchanged(self, key: bytes) -> bool:
        """Whether the block is where it was when this was opened, and was not written again."""
        record = self._records[key]
        return read_record(self._record_file, self.geometry, record.slot) == record

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Does nothing: what is damaged is for the tier's owner to remove."""

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())
