"""The file ``lock`` of a tier's directory: a lock for one process, and the id of that process."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CONTENT_NBYTES = 32
_CONTENT = re.compile(rb"(\d+ *)?")


def is_lock_file(fd: int) -> bool:
    """Whether a file has what :func:`write_pid` writes, or nothing."""
    content = os.pread(fd, _CONTENT_NBYTES + 1, 0)
    return len(content) <= _CONTENT_NBYTES and _CONTENT.fullmatch(content) is not None


def acquire(fd: int, path: Path) -> None:
    """Lock the file in the directory ``path``, until it is closed or unlocked.

    Raises:
        ValueError: another process has locked it; the message names that process.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        written_pid = os.pread(fd, _CONTENT_NBYTES, 0).decode(errors="replace").strip() or "?"
        owner = _find_owner(os.fstat(fd), locked=True)
        pid = owner or f"{written_pid} (which cannot be seen from here)"
        raise ValueError(
            f"path is {str(path)!r}, which process {pid} has open; every tier needs a directory of "
            "its own"
        ) from None


def write_pid(fd: int) -> None:
    """Write the id of this process into the file, which this process has locked."""
    os.pwrite(fd, str(os.getpid()).ljust(_CONTENT_NBYTES).encode(), 0)


def find_owner(path: Path) -> int | None:
    """Return the process that has the directory ``path`` open, if this process can see it.

    This takes no lock: even a short one could make an engine that starts now fail.
    """
    try:
        return _find_owner((path / "lock").lstat(), locked=False)
    except OSError:
        return None


def _find_owner(lock: os.stat_result, locked: bool) -> int | None:
    """Return the process that has locked a file.

    The kernel names the process that took the lock. If that process has ended, a child of it that
    inherited the open file has the lock.

    Args:
        lock: the file's status.
        locked: whether the file is known to be locked.
    """
    file = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            match line.split():
                case [_, "FLOCK", _, "WRITE", pid, where, *_] if where == file:
                    if Path("/proc", pid).exists():
                        return int(pid)
                    locked = True
    return next(_processes_with_open(lock), None) if locked else None


def _processes_with_open(file: os.stat_result) -> Iterator[int]:
    """Yield the other processes that have a file open, of those that this process can see."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(OSError):  # the process belongs to another user, or has ended
                for open_file in (process / "fd").iterdir():
                    with suppress(OSError):
                        if os.path.samestat(open_file.stat(), file):
                            yield int(process.name)
