"""The open files of a disk tier's directory, and the space that they take.

Invariants:

* One process has the directory open, from the construction of :class:`TierDirectory` to its
  ``close`` or to the end of the process. A forked child does not have it open.
* If one of the files was not written by a tier, nothing in the directory is changed.
* Only the owner can read the files, also if they existed with other permissions.
* Space is allocated when the tier is opened, not when blocks are written. The file system's own
  metadata comes on top.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from kvcache.process import bind_to_process
from kvcache.replica import Replica
from kvcache.sizes import format_size
from kvcache.tiers.disk import lock_file
from kvcache.tiers.disk.record_file import PAGE, find_foreign_file
from kvcache.tiers.disk.replicas import (
    FileSizes,
    reclaim_space,
    replica_directories,
    replica_directory,
    startup_lock,
    truncate_files,
)
from kvcache.tiers.disk.safe_open import (
    check_ownership,
    open_directory,
    open_file,
    open_subdirectory,
)

_CREATE = os.O_RDWR | os.O_CREAT


class TierDirectory:
    """A tier's directory with its files; created if it does not exist.

    Args:
        path: the absolute path that the replicas of one engine share.
        replica: which replica this is, of how many. Replicas other than the first have a directory
            below ``path``.
        sizes: the most bytes of each file; a larger file is cut.

    Attributes:
        path: the directory of this replica.
        folder_fd: the descriptor of the directory.
        lock_fd, records_fd, blocks_fd: the descriptors of the files.

    Raises:
        ValueError: the path is not a directory, or cannot be trusted, or another process has it
            open.
        OSError: the file system reported another error.
    """

    def __init__(self, path: Path, replica: Replica, sizes: FileSizes) -> None:
        self.path = path / replica_directory(replica.index)
        self._fds: list[int] = []
        self._locked = False
        try:
            root_fd = self.close_later(open_directory(path, make=True))
            check_ownership(root_fd, path)
            with startup_lock(root_fd, path, replica):
                self.folder_fd = root_fd
                if replica.index:
                    name = replica_directory(replica.index)
                    self.folder_fd = self.close_later(
                        open_subdirectory(root_fd, name, path, make=True)
                    )
                    check_ownership(self.folder_fd, self.path)
                self._open_files(sizes)
                reclaim_space(root_fd, path, replica, sizes)
        except BaseException:
            self.close()
            raise
        bind_to_process(self)

    def _open_files(self, sizes: FileSizes) -> None:
        """Lock the directory and open its files; change a file only after all are checked."""
        self.lock_fd = self._open("lock")
        _refuse_foreign_files({"lock": self.lock_fd}, self.path)
        lock_file.acquire(self.lock_fd, self.path)
        self._locked = True
        self.records_fd = self._open("records")
        self.blocks_fd = self._open("blocks")
        files = {"records": self.records_fd, "blocks": self.blocks_fd}
        _refuse_foreign_files(files, self.path)
        lock_file.write_pid(self.lock_fd)
        for fd in (self.lock_fd, self.records_fd, self.blocks_fd):
            if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:  # it existed, readable for others
                os.fchmod(fd, 0o600)
        truncate_files(files, sizes)

    def _open(self, name: str) -> int:
        return self.close_later(open_file(self.folder_fd, name, self.path, _CREATE))

    def close_later(self, fd: int) -> int:
        """Close ``fd`` together with the directory; return it."""
        self._fds.append(fd)
        return fd

    def check_room(self, need: int) -> None:
        """Raise ``ValueError`` if the disk has no room for ``need`` bytes of the two files."""
        allocated = sum(os.fstat(fd).st_blocks * 512 for fd in (self.records_fd, self.blocks_fd))
        if problem := shortage(self.path, need, allocated):
            raise ValueError(problem)

    def allocate_blocks(self, nbytes: int) -> None:
        """Allocate the space of the file ``blocks``, and use direct I/O on it where possible."""
        fd = self.blocks_fd
        os.ftruncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.preadv(fd, [memoryview(mmap.mmap(-1, PAGE))], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def close(self) -> None:
        """Close the files. Closing twice is allowed."""
        if self._locked:
            # A process that inherited the file would keep the lock if it were only closed here.
            fcntl.flock(self.lock_fd, fcntl.LOCK_UN)
            self._locked = False
        while self._fds:
            os.close(self._fds.pop())

    def _release_in_child(self) -> None:
        """In a forked child: close the child's copies of the files, which would keep the lock.

        A bound ``close`` from before the fork may run in the child. It must not unlock the parent's
        file, nor a file that has the descriptor's number by then.
        """
        self._locked = False
        while self._fds:
            os.close(self._fds.pop())


def check_usable(path: Path) -> None:
    """Check a directory as a tier would that opens it; create and change nothing.

    A directory that does not exist is usable.

    Raises:
        ValueError: a tier would refuse the directory.
        OSError: the file system reported another error.
    """
    try:
        folder_fd = open_directory(path, make=False)
    except FileNotFoundError:
        return
    files: dict[str, int] = {}
    try:
        check_ownership(folder_fd, path)
        for name in ("lock", "records", "blocks"):
            with suppress(FileNotFoundError):
                files[name] = open_file(folder_fd, name, path)
        _refuse_foreign_files(files, path)
    finally:
        for fd in (folder_fd, *files.values()):
            os.close(fd)


def _refuse_foreign_files(files: Mapping[str, int], path: Path) -> None:
    """Raise ``ValueError`` if a file was not written by a tier.

    Args:
        files: descriptors, by name.
        path: the directory.
    """
    if name := _find_foreign(files):
        raise ValueError(
            f"path is {str(path)!r}, where {name!r} was not written by kvcache; move it away, or "
            "give the tier a directory of its own"
        )


def _find_foreign(files: Mapping[str, int]) -> str | None:
    if "lock" in files and not lock_file.is_lock_file(files["lock"]):
        return "lock"
    return find_foreign_file(files.get("records"), files.get("blocks"))


def shortage(path: Path, need: int, allocated: int | None = None) -> str | None:
    """Return why a tier's files in ``path`` cannot have ``need`` bytes; ``None`` if they can.

    Args:
        path: an existing directory.
        need: bytes of the files ``records`` and ``blocks`` together.
        allocated: bytes that they have already; by default those of all replicas below ``path``.

    Raises:
        OSError: ``path`` does not exist.
    """
    space = os.statvfs(path)
    if allocated is None:
        allocated = sum(_allocated_nbytes(path))
    room = space.f_bavail * space.f_frsize + allocated
    if need <= room:
        return None
    return (
        f"capacity needs {format_size(need)} at {str(path)!r}, "
        f"but only {format_size(room)} are free"
    )


def _allocated_nbytes(path: Path) -> Iterator[int]:
    """Yield the allocated bytes of each file of each replica, without opening it."""
    for name in replica_directories(path).values():
        for file in ("records", "blocks"):
            with suppress(OSError):
                status = (path / name / file).lstat()
                if stat.S_ISREG(status.st_mode):
                    yield status.st_blocks * 512
