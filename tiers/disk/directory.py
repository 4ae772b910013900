"""The files of a disk tier's directory: which process has them, and what they take of a disk.

Always true here:

* One process has the directory open, from :class:`Directory` to its ``close``, or its own end. A
  process that it forked does not have it.
* Nothing is changed in a directory where a file of the tier's is not the tier's.
* Nobody but the owner can read the files, also when they were there before.
* Space is taken when it is asked for and not when it is written to. What the file system needs to
  keep account of it comes on top.
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
from kvcache.tiers.disk.record_file import PAGE, foreign_file
from kvcache.tiers.disk.replicas import (
    Share,
    cut,
    directory_name,
    one_at_a_time,
    reclaim,
    replica_directories,
)
from kvcache.tiers.disk.safe_open import (
    check_ownership,
    open_directory,
    open_file,
    open_subdirectory,
)

_MADE = os.O_RDWR | os.O_CREAT


class Directory:
    """A directory of one tier's own, made if it is not there.

    Args:
        path: where; absolute.
        replica: which one of the engine's, of how many. Others than the first have a directory
            below ``path``.
        share: what its files may have of the disk; what they have beyond is given up.

    Attributes:
        path: the directory of this replica.
        folder: the open directory.
        lock, records, blocks: the files, by number.

    Raises:
        ValueError: when it is no directory, or cannot be trusted, or another process has it open.
        OSError: for whatever else the file system says.
    """

    def __init__(self, path: Path, replica: Replica, share: Share) -> None:
        self.path = path / directory_name(replica.index)
        self._open: list[int] = []
        self._locked = False
        try:
            root = self._kept(open_directory(path, make=True))
            check_ownership(root, path)
            with one_at_a_time(root, path, replica):
                folder = root
                if replica.index:
                    name = directory_name(replica.index)
                    folder = self._kept(open_subdirectory(root, name, path, make=True))
                    check_ownership(folder, self.path)
                self.folder = folder
                self._open_files(folder, share)
                reclaim(root, path, replica, share)
        except BaseException:
            self.close()
            raise
        bind_to_process(self)

    def _open_files(self, folder: int, share: Share) -> None:
        """Lock the directory and open its files; change nothing before all of them are ours."""
        self.lock = self._kept(open_file(folder, "lock", self.path, _MADE))
        _refuse_foreign({"lock": self.lock}, self.path)
        lock_file.take(self.lock, self.path)
        self._locked = True
        self.records = self._kept(open_file(folder, "records", self.path, _MADE))
        self.blocks = self._kept(open_file(folder, "blocks", self.path, _MADE))
        _refuse_foreign({"records": self.records, "blocks": self.blocks}, self.path)
        lock_file.sign(self.lock)
        for file in (self.lock, self.records, self.blocks):
            if stat.S_IMODE(os.fstat(file).st_mode) & 0o077:  # it was there, for others to read
                os.fchmod(file, 0o600)
        cut(self.records, self.blocks, share)

    def _kept(self, file: int) -> int:
        """Have ``file`` closed with the directory."""
        self._open.append(file)
        return file

    def check_room(self, need: int) -> None:
        """Raise ``ValueError`` where the two files cannot have ``need`` bytes together."""
        have = sum(os.fstat(file).st_blocks * 512 for file in (self.records, self.blocks))
        if why := shortage(self.path, need, have):
            raise ValueError(why)

    def take_blocks(self, nbytes: int) -> None:
        """Give the file of blocks its space; from now on it is direct where it can be."""
        os.ftruncate(self.blocks, nbytes)
        os.posix_fallocate(self.blocks, 0, nbytes)
        flags = fcntl.fcntl(self.blocks, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.blocks, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.preadv(self.blocks, [memoryview(mmap.mmap(-1, PAGE))], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            fcntl.fcntl(self.blocks, fcntl.F_SETFL, flags)

    def close(self) -> None:
        """Close the files. Closing twice is allowed."""
        if self._locked:
            # Closing it is not enough where another process has inherited it.
            fcntl.flock(self.lock, fcntl.LOCK_UN)
            self._locked = False
        while self._open:
            os.close(self._open.pop())

    def _release_in_child(self) -> None:
        """In a child: close its copies; the lock would else last as long as the child.

        A ``close`` that was bound before the fork runs here as it is, and must not unlock what has
        the lock's number by then.
        """
        self._locked = False
        while self._open:
            os.close(self._open.pop())


def check_usable(path: Path) -> None:
    """Raise ``ValueError`` for a directory that a tier would refuse. Makes and changes nothing.

    Raises OSError for what the file system reports; a directory that is not there is no error.
    """
    try:
        folder = open_directory(path, make=False)
    except FileNotFoundError:
        return
    files: dict[str, int] = {}
    try:
        check_ownership(folder, path)
        for name in ("lock", "records", "blocks"):
            with suppress(FileNotFoundError):
                files[name] = open_file(folder, name, path)
        _refuse_foreign(files, path)
    finally:
        for file in (folder, *files.values()):
            os.close(file)


def _refuse_foreign(files: Mapping[str, int], path: Path) -> None:
    """Raise ``ValueError`` if one of the files that a tier has in ``path`` is not a tier's."""
    if name := _foreign(files):
        raise ValueError(
            f"path is {str(path)!r}, where {name!r} was not written by kvcache; move it away, or "
            "give the tier a directory of its own"
        )


def _foreign(files: Mapping[str, int]) -> str | None:
    if "lock" in files and not lock_file.is_lock(files["lock"]):
        return "lock"
    if "records" in files and "blocks" in files:
        return foreign_file(files["records"], files["blocks"])
    return "blocks" if "blocks" in files and os.fstat(files["blocks"]).st_size else None


def shortage(path: Path, need: int, have: int | None = None) -> str | None:
    """Why a tier's files in ``path`` cannot have ``need`` bytes together; ``None`` if they can.

    ``have`` is what they have already, by default all that replicas have there. Opens nothing.
    Raises OSError where ``path`` is not there.
    """
    space = os.statvfs(path)
    fits = space.f_bavail * space.f_frsize + (sum(_taken(path)) if have is None else have)
    if need <= fits:
        return None
    return (
        f"capacity asks for {format_size(need)} at {str(path)!r}, where {format_size(fits)} are "
        "free"
    )


def _taken(path: Path) -> Iterator[int]:
    for name in replica_directories(path).values():
        for file in ("records", "blocks"):
            with suppress(OSError):
                found = (path / name / file).lstat()
                if stat.S_ISREG(found.st_mode):
                    yield found.st_blocks * 512
