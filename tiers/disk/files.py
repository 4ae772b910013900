"""The files of a disk tier's directory: who may have them open, and what they take of the disk.

Always true here:

* One process has the directory open, from :class:`Directory` to its ``close``, or its own end.
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
from pathlib import Path

from kvcache.sizes import format_size

PAGE = 4096  # what direct I/O goes by


class Directory:
    """A directory of one tier's own, made if it is not there.

    Attributes:
        lock, records, blocks: the files, by number.

    Raises:
        ValueError: when it is no directory, or another process has it open.
        OSError: for whatever else the file system says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: list[int] = []
        self._pid = os.getpid()
        try:
            self.lock = self._locked()
            self.records = self._file("records")
            self.blocks = self._file("blocks")
        except BaseException:
            self.close()
            raise

    def _locked(self) -> int:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"path is {str(self.path)!r}, which is not a directory") from None
        lock = self._file("lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "?"
            raise ValueError(
                f"path is {str(self.path)!r}, which process {holder} has open; every tier needs a "
                "directory of its own"
            ) from None
        os.pwrite(lock, str(self._pid).ljust(32).encode(), 0)
        return lock

    def _file(self, name: str, flags: int = 0) -> int:
        file = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        self._open.append(file)
        if stat.S_IMODE(os.fstat(file).st_mode) & 0o077:  # it was there, for others to read
            os.fchmod(file, 0o600)
        return file

    def check_room(self, need: int) -> None:
        """Raise ``ValueError`` where the two files cannot have ``need`` bytes together."""
        if why := shortage(self.path, need):
            raise ValueError(why)

    def take_blocks(self, nbytes: int) -> None:
        """Give the file of blocks its space; from now on it is direct where it can be."""
        os.ftruncate(self.blocks, nbytes)
        os.posix_fallocate(self.blocks, 0, nbytes)
        try:
            direct = self._file("blocks", os.O_DIRECT)
            os.preadv(direct, [memoryview(mmap.mmap(-1, PAGE))], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        else:
            self.blocks = direct

    def close(self) -> None:
        """Close the files. Closing twice is allowed."""
        if self._open and os.getpid() == self._pid:
            # A child that was forked has the file as well: closing ours alone would free nothing,
            # and closing its own frees nothing of ours.
            fcntl.flock(self._open[0], fcntl.LOCK_UN)
        while self._open:
            os.close(self._open.pop())


def shortage(path: Path, need: int) -> str | None:
    """Why the tier's files in ``path`` cannot have ``need`` bytes together; ``None`` if they can.

    Opens nothing. Raises OSError where ``path`` is not there.
    """
    have = sum(
        (path / name).stat().st_blocks * 512
        for name in ("records", "blocks")
        if (path / name).exists()
    )
    space = os.statvfs(path)
    free = space.f_bavail * space.f_frsize
    if need <= have + free:
        return None
    return (
        f"capacity asks for {format_size(need)} at {str(path)!r}, where "
        f"{format_size(have + free)} are free"
    )


def holder(path: Path) -> int | None:
    """The process that has the directory open, if it can be seen from here.

    Reads what the kernel says of locks: taking the lock, however shortly, could refuse an engine
    that starts in this moment.
    """
    try:
        lock = (path / "lock").stat()
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    file = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    for line in locks.splitlines():
        match line.split():
            case [_, "FLOCK", _, "WRITE", pid, where, *_] if where == file:
                return int(pid)
    return None
