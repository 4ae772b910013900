"""The directories of the replicas of one engine, which have one ``path`` and one capacity together.

::

    path/             lock, records and blocks of replica 0, the only one as a rule
    path/replica-1/   the same of replica 1; and so on

Always true here:

* The files below ``path`` never exceed the capacity, whatever number of replicas ran before. Each
  replica, before it takes space, cuts down or deletes what replicas that no longer run have left.
* What a replica that runs has open is not touched. If it has more than its share, or is none of
  the replicas that there are now, this one does not start.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kvcache.replica import Replica
from kvcache.sizes import format_size
from kvcache.tiers.disk import lock_file, namespace_file
from kvcache.tiers.disk.record_file import foreign_file, mark
from kvcache.tiers.disk.safe_open import open_file, open_subdirectory

log = logging.getLogger(__name__)

OPENING_S = 60.0  # how long one replica waits for others to start
_RETRY_S = 0.02
_NAME = re.compile(r"replica-([1-9][0-9]*)")
_CANNOT_LOCK = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Share(NamedTuple):
    """Bytes that one replica's files may have."""

    records: int
    blocks: int


def directory_name(index: int) -> str:
    """The directory of a replica, as seen from ``path``."""
    return f"replica-{index}" if index else "."


def replica_directories(folder: int | Path) -> dict[int, str]:
    """The directories of replicas that there are, by index; that of replica 0 always."""
    with os.scandir(folder) as entries:
        names = [match for entry in entries if (match := _NAME.fullmatch(entry.name))]
    return {0: "."} | {int(match[1]): match[0] for match in names}


@contextmanager
def one_at_a_time(folder: int, path: Path, replica: Replica) -> Iterator[None]:
    """Have no other replica start meanwhile.

    Raises ValueError when others take longer than ``OPENING_S``.
    """
    until = time.monotonic() + OPENING_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise ValueError(
                    f"path is {str(path)!r}, which another engine has been opening for "
                    f"{OPENING_S:.0f} s"
                ) from None
            time.sleep(_RETRY_S)
        except OSError as error:
            # NFS cannot lock a directory; of one replica the lock on its files is enough.
            if error.errno not in _CANNOT_LOCK or replica.count > 1:
                raise
            yield
            return
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def reclaim(folder: int, path: Path, replica: Replica, share: Share) -> None:
    """Cut down, or delete, what other replicas than this one have left in ``path``.

    Raises:
        ValueError: when one of them runs and should not.
        OSError: for whatever the file system reports.
    """
    for index, name in replica_directories(folder).items():
        if index == replica.index:
            continue
        try:
            other = open_subdirectory(folder, name, path, make=False)
        except ValueError:
            continue  # something else has that name
        try:
            _reclaim(other, path / name, index < replica.count, share)
        finally:
            os.close(other)
        if index >= replica.count:
            with suppress(OSError):  # somebody else's files are in it
                os.rmdir(name, dir_fd=folder)


def _reclaim(folder: int, path: Path, stays: bool, share: Share) -> None:
    """Do so in one directory: to its share if it ``stays``, else altogether."""
    files: dict[str, int] = {}
    try:
        for name in ("lock", "records", "blocks"):
            with suppress(FileNotFoundError):
                files[name] = open_file(folder, name, path)
        if "records" not in files or foreign_file(files["records"], files.get("blocks")):
            return  # not a tier's
        have = sum(os.fstat(files[name]).st_size for name in files.keys() - {"lock"})
        if "lock" in files:
            try:
                lock_file.take(files["lock"], path)
            except ValueError:
                if stays and have <= sum(share):
                    return
                raise
        if stays:
            if "blocks" in files:
                cut(files["records"], files["blocks"], share)
            return
        # The records last: until they are gone, the next engine knows that the rest is a tier's.
        for name in ("blocks", *namespace_file.FILES, "lock", "records"):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        log.info(
            "kvcache: disk tier at %s: %s of a former replica deleted", path, format_size(have)
        )
    finally:
        for file in files.values():
            os.close(file)


def cut(records: int, blocks: int, share: Share) -> None:
    """Give up what the files have beyond a share."""
    mark(blocks)  # a copy of another size than its records say would else be no tier's
    for file, nbytes in ((records, share.records), (blocks, share.blocks)):
        if os.fstat(file).st_size > nbytes:
            os.ftruncate(file, nbytes)
