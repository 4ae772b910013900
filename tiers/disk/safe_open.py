"""Where a disk tier's files are, and that they are the tier's own: others may have been there.

Always true here:

* A file or a directory is opened once, relative to its open directory, and is checked by its
  descriptor. What happens to names afterwards changes nothing.
* A symbolic link is followed only on the way to the directory, and only when its owner is root or
  the user of this process. Below the directory no link is followed.
* A file that is used is regular, belongs to the user of this process, and has no second name.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
_MOST_LINKS = 40  # the kernel's own limit
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_FILES = {
    errno.ELOOP: "a symbolic link",
    errno.EISDIR: "a directory",
    errno.ENXIO: "a socket or a pipe",
    errno.ENODEV: "a device",
}
"""What an attempt to open something else than a file fails with."""


def expand_path(path: str) -> Path:
    """The absolute path that the option ``path`` means: ``~``, ``$NAME`` and ``${NAME}`` expanded.

    Raises ValueError when it is empty, or when a name in it is unknown.
    """
    if not path.strip() or "\0" in path:
        raise ValueError(f'path is {path!r}; it takes a directory, such as "/var/cache/kvcache"')
    try:
        home = str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"path is {path!r}, and there is no such home directory") from error

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not (found := os.environ.get(name)):
            raise ValueError(f"path is {path!r}, and the environment variable {name!r} is not set")
        return found

    return Path.cwd() / _VARIABLE.sub(value, home)


def open_directory(path: Path, *, make: bool) -> int:
    """Open the directory ``path``, which is absolute, and return its descriptor.

    ``make`` makes what is missing of it, for this user alone, whatever the umask allows.

    Raises:
        ValueError: when ``path`` is no directory, or a link in it belongs to another user.
        OSError: for whatever else the file system reports.
    """
    at, links = os.open("/", _LOOK), 0
    todo = list(reversed(path.parts[1:]))
    try:
        while todo:
            part = todo.pop()
            found = _part(at, part, make)
            if stat.S_ISLNK(os.fstat(found).st_mode):
                try:
                    target = _target(found, path, part)
                finally:
                    os.close(found)
                if (links := links + 1) > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                todo += reversed(target.parts[target.is_absolute() :])
                if not target.is_absolute():
                    continue
                found = os.open("/", _LOOK)
            os.close(at)
            at = found
        if not stat.S_ISDIR(os.fstat(at).st_mode):
            raise ValueError(f"path is {str(path)!r}, which is not a directory")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


def _part(folder: int, part: str, make: bool) -> int:
    """A descriptor of what ``part`` names in ``folder``, a link itself if it is one."""
    try:
        return os.open(part, _LOOK, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process made it meanwhile
        os.mkdir(part, 0o700, dir_fd=folder)
    return os.open(part, _LOOK, dir_fd=folder)


def _target(link: int, path: Path, part: str) -> Path:
    owner = os.fstat(link).st_uid
    if owner not in (0, os.geteuid()):
        raise ValueError(
            f"path is {str(path)!r}, where {part!r} is a symbolic link of user {owner}; links of "
            f"root and of user {os.geteuid()}, which this process is, are followed"
        )
    return Path(os.readlink("", dir_fd=link))


def open_subdirectory(folder: int, name: str, path: Path, *, make: bool) -> int:
    """Open the directory ``name`` in ``folder``, whose path is ``path``; no link to one.

    Raises:
        ValueError: when it is something else.
        FileNotFoundError: when it is not there and ``make`` is false.
    """
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=folder)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
    raise ValueError(
        f"path is {str(path)!r}, where {name!r} is not a directory; move it away, or give the tier "
        "a directory of its own"
    )


def check_ownership(folder: int, path: Path) -> None:
    """Refuse a directory of another user than root and ours; warn of one that others may write.

    Raises ValueError.
    """
    found = os.fstat(folder)
    if found.st_uid not in (0, os.geteuid()):
        raise ValueError(
            f"path is {str(path)!r}, which belongs to user {found.st_uid}; it must belong to user "
            f"{os.geteuid()}, which this process is, or to root"
        )
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        log.warning(
            "kvcache: disk tier at %s: other users may rename and delete its files (mode %04o); "
            "blocks can get lost, and are never read from files of theirs",
            path,
            stat.S_IMODE(found.st_mode),
        )


def open_file(folder: int, name: str, path: Path, flags: int = os.O_RDWR) -> int:
    """Open a file in the directory ``folder``, whose path is ``path``, and check what it is.

    Raises:
        ValueError: when it is not a regular file with one name, or, opened to write, not ours.
        OSError: for whatever else the file system reports.
    """
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would wait for its other end
    try:
        file = os.open(name, flags | safe, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno not in _NOT_FILES:
            raise
        what = _NOT_FILES[error.errno]
    else:
        found, user = os.fstat(file), os.geteuid()
        if stat.S_ISREG(found.st_mode) and found.st_nlink < 2:
            if found.st_uid == user or not flags & os.O_RDWR:
                os.set_blocking(file, True)  # reads and writes are as they would be without
                return file
            what = f"a file of user {found.st_uid} (this process is user {user})"
        elif found.st_nlink > 1:
            what = "a file with several names (hard links)"
        else:
            what = "not a regular file"
        os.close(file)
    raise ValueError(
        f"path is {str(path)!r}, where {name!r} is {what}; move it away, or give the tier a "
        "directory of its own"
    )
