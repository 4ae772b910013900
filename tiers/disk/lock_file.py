"""Which process has a disk tier's directory open: a lock on one of its files."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NBYTES = 32
_WRITTEN = re.compile(rb"(\d+ *)?")


def is_lock(file: int) -> bool:
    """Whether a file has what :func:`sign` writes, or nothing."""
    written = os.pread(file, _NBYTES + 1, 0)
    return len(written) <= _NBYTES and _WRITTEN.fullmatch(written) is not None


def take(file: int, path: Path) -> None:
    """Lock the file, in the directory ``path``, until it is closed or unlocked.

    Raises ValueError when it is locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        written = os.pread(file, _NBYTES, 0).decode(errors="replace").strip() or "?"
        pid = (
            _find_owner(os.fstat(file), held=True) or f"{written} (which cannot be seen from here)"
        )
        raise ValueError(
            f"path is {str(path)!r}, which process {pid} has open; every tier needs a directory of "
            "its own"
        ) from None


def sign(file: int) -> None:
    """Write into a file that was locked which process has locked it."""
    os.pwrite(file, str(os.getpid()).ljust(_NBYTES).encode(), 0)


def find_owner(path: Path) -> int | None:
    """The process that has the directory open, if it can be seen from here.

    Takes no lock: that, however shortly, could refuse an engine that starts in this moment.
    """
    try:
        return _find_owner((path / "lock").lstat(), held=False)
    except OSError:
        return None


def _find_owner(lock: os.stat_result, held: bool) -> int | None:
    """The process that has a lock on the file; ``held`` says that one has.

    The kernel names the process that took it. When that one has ended, a process that it started
    has the lock, and has the file open.
    """
    file = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            match line.split():
                case [_, "FLOCK", _, "WRITE", pid, where, *_] if where == file:
                    if Path("/proc", pid).exists():
                        return int(pid)
                    held = True
    return next(_having_open(lock), None) if held else None


def _having_open(file: os.stat_result) -> Iterator[int]:
    """Other processes that have a file open, as far as they can be seen."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(OSError):  # of another user, or it has ended
                for opened in (process / "fd").iterdir():
                    with suppress(OSError):
                        if os.path.samestat(opened.stat(), file):
                            yield int(process.name)
