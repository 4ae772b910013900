"""The directories of the replicas of one engine, which share a path and a capacity.

::

    path/             lock, records and blocks of replica 0; usually there is no other replica
    path/replica-1/   the same of replica 1; and so on

Invariants:

* The files below ``path`` never exceed the capacity, whatever number of replicas ran before. Before
  a replica allocates space, it cuts or deletes the files of replicas that no longer run.
* Files of a replica that runs are not changed. If a running replica has more than its share, or its
  number is not below the number of replicas now, the new one does not start.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kvcache.replica import Replica
from kvcache.sizes import format_size
from kvcache.tiers.disk import lock_file, namespace_file
from kvcache.tiers.disk.record_file import find_foreign_file, mark_blocks
from kvcache.tiers.disk.safe_open import open_file, open_subdirectory

log = logging.getLogger(__name__)

STARTUP_TIMEOUT_S = 60.0
"""How long a replica waits for other replicas to open their directories."""
_RETRY_S = 0.02
_NAME = re.compile(r"replica-([1-9][0-9]*)")
_LOCK_UNSUPPORTED = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class FileSizes(NamedTuple):
    """The bytes that the files of one replica may have."""

    records: int
    blocks: int


def replica_directory(index: int) -> str:
    """Return the directory of a replica, relative to ``path``."""
    return f"replica-{index}" if index else "."


def replica_directories(folder: int | Path) -> dict[int, str]:
    """Return the existing directories of replicas, by index; replica 0 is always included."""
    with os.scandir(folder) as entries:
        names = [match for entry in entries if (match := _NAME.fullmatch(entry.name))]
    return {0: "."} | {int(match[1]): match[0] for match in names}


@contextmanager
def startup_lock(folder_fd: int, path: Path, replica: Replica) -> Iterator[None]:
    """Let one replica at a time open its directory.

    Raises:
        ValueError: other replicas had the lock for :data:`STARTUP_TIMEOUT_S`.
    """
    until = time.monotonic() + STARTUP_TIMEOUT_S
    while True:
        try:
            fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise ValueError(
                    f"path is {str(path)!r}, which another engine has been opening for "
                    f"{STARTUP_TIMEOUT_S:.0f} s"
                ) from None
            time.sleep(_RETRY_S)
        except OSError as error:
            # NFS cannot lock a directory. With one replica, the lock on its files is enough.
            if error.errno not in _LOCK_UNSUPPORTED or replica.count > 1:
                raise
            yield
            return
    try:
        yield
    finally:
        fcntl.flock(folder_fd, fcntl.LOCK_UN)


def reclaim_space(folder_fd: int, path: Path, replica: Replica, sizes: FileSizes) -> None:
    """Cut or delete the files that other replicas have left in ``path``.

    Raises:
        ValueError: a replica runs that has more than its share, or that should not run.
        OSError: the file system reported an error.
    """
    for index, name in replica_directories(folder_fd).items():
        if index == replica.index:
            continue
        try:
            other_fd = open_subdirectory(folder_fd, name, path, make=False)
        except ValueError:
            continue  # it is not a directory
        try:
            _reclaim_replica(other_fd, path / name, index < replica.count, sizes)
        finally:
            os.close(other_fd)
        if index >= replica.count:
            with suppress(OSError):  # it contains other files
                os.rmdir(name, dir_fd=folder_fd)


def _reclaim_replica(folder_fd: int, path: Path, in_use: bool, sizes: FileSizes) -> None:
    """Cut the files of one replica if its number is ``in_use`` now; otherwise delete them."""
    files: dict[str, int] = {}
    try:
        for name in ("lock", "records", "blocks"):
            with suppress(FileNotFoundError):
                files[name] = open_file(folder_fd, name, path)
        if not files.keys() - {"lock"}:
            return
        if find_foreign_file(files.get("records"), files.get("blocks")):
            return  # another program wrote it
        nbytes = sum(os.fstat(files[name]).st_size for name in files.keys() - {"lock"})
        if "lock" in files:
            try:
                lock_file.acquire(files["lock"], path)
            except ValueError:
                if in_use and nbytes <= sum(sizes):
                    return
                raise
        if in_use:
            truncate_files(files, sizes)
            return
        # `records` is last: while it exists, the next engine knows that the files are a tier's.
        for name in ("blocks", *namespace_file.FILE_NAMES, "lock", "records"):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder_fd)
        log.info(
            "kvcache: disk tier at %s: %s of a former replica deleted", path, format_size(nbytes)
        )
    finally:
        for fd in files.values():
            os.close(fd)


def truncate_files(files: Mapping[str, int], sizes: FileSizes) -> None:
    """Cut ``records`` and ``blocks`` to ``sizes``; a smaller file stays as it is.

    Args:
        files: descriptors, by name. A file that does not exist is left out.
        sizes: the most bytes of each.
    """
    if "blocks" in files:
        # Without the mark, a copied file would be identified by its size, which changes here.
        mark_blocks(files["blocks"])
    for name, nbytes in sizes._asdict().items():
        if name in files and os.fstat(files[name]).st_size > nbytes:
            os.ftruncate(files[name], nbytes)
