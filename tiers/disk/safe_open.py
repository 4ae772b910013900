"""Opens files and directories that other users may have changed, and checks their kind and owner.

Invariants:

* A file or a directory is opened once, relative to its open parent directory, and is checked by its
  descriptor. So renaming it afterwards has no effect.
* A symbolic link is followed only on the way to the tier's directory, and only if it belongs to
  root or to the user of this process. No link is followed below the directory.
* A file that is written is a regular file, belongs to the user of this process, and has one name.
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
_MAX_LINKS = 40  # the kernel's own limit
_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_KIND_BY_ERRNO = {
    errno.ELOOP: "a symbolic link",
    errno.EISDIR: "a directory",
    errno.ENXIO: "a socket or a pipe",
    errno.ENODEV: "a device",
}
"""The kind of a path, by the error that opening it as a file raises."""


def expand_path(path: str) -> Path:
    """Return the option ``path`` as an absolute path; expand ``~``, ``$NAME`` and ``${NAME}``.

    Raises:
        ValueError: ``path`` is empty, or names a user or a variable that does not exist.
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
    """Open the directory ``path`` and return its descriptor.

    Args:
        path: an absolute path.
        make: create missing directories, with access for this user alone, whatever the umask.

    Raises:
        ValueError: ``path`` is not a directory, or a link on the way belongs to another user.
        OSError: the file system reported another error.
    """
    folder_fd, links = os.open("/", _PATH_FLAGS), 0
    parts = list(reversed(path.parts[1:]))  # the next one is last
    try:
        while parts:
            part = parts.pop()
            fd = _open_part(folder_fd, part, make)
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                try:
                    target = _read_link(fd, path, part)
                finally:
                    os.close(fd)
                if (links := links + 1) > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                parts += reversed(target.parts[target.is_absolute() :])
                if not target.is_absolute():
                    continue
                fd = os.open("/", _PATH_FLAGS)
            os.close(folder_fd)
            folder_fd = fd
        if not stat.S_ISDIR(os.fstat(folder_fd).st_mode):
            raise ValueError(f"path is {str(path)!r}, which is not a directory")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)


def _open_part(folder_fd: int, part: str, make: bool) -> int:
    """Return a descriptor of ``part`` in a directory; of the link itself if it is a link."""
    try:
        return os.open(part, _PATH_FLAGS, dir_fd=folder_fd)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process created it in the meantime
        os.mkdir(part, 0o700, dir_fd=folder_fd)
    return os.open(part, _PATH_FLAGS, dir_fd=folder_fd)


def _read_link(link_fd: int, path: Path, part: str) -> Path:
    """Return the target of an open link; refuse a link of another user."""
    owner = os.fstat(link_fd).st_uid
    if owner not in (0, os.geteuid()):
        raise ValueError(
            f"path is {str(path)!r}, where {part!r} is a symbolic link of user {owner}; only "
            f"links of root and of this process's user {os.geteuid()} are followed"
        )
    return Path(os.readlink("", dir_fd=link_fd))


def open_subdirectory(folder_fd: int, name: str, path: Path, *, make: bool) -> int:
    """Open the directory ``name`` in an open directory, and return its descriptor.

    Args:
        folder_fd: the parent directory.
        name: the name in it; a link is refused.
        path: the path of the parent directory, for messages.
        make: create the directory if it does not exist.

    Raises:
        ValueError: ``name`` is not a directory.
        FileNotFoundError: it does not exist, and ``make`` is false.
    """
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=folder_fd)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=folder_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
    raise ValueError(
        f"path is {str(path)!r}, where {name!r} is not a directory; move it away, or give the tier "
        "a directory of its own"
    )


def check_ownership(folder_fd: int, path: Path) -> None:
    """Check that a directory belongs to this user or root; warn if others can write to it.

    Raises:
        ValueError: it belongs to another user.
    """
    found = os.fstat(folder_fd)
    if found.st_uid not in (0, os.geteuid()):
        raise ValueError(
            f"path is {str(path)!r}, which belongs to user {found.st_uid}; it must belong to root "
            f"or to this process's user {os.geteuid()}"
        )
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        log.warning(
            "kvcache: disk tier at %s: other users can rename and delete its files (mode %04o); "
            "blocks can be lost, but files of other users are never read",
            path,
            stat.S_IMODE(found.st_mode),
        )


def open_file(folder_fd: int, name: str, path: Path, flags: int = os.O_RDWR) -> int:
    """Open a file in an open directory, check its kind and owner, and return its descriptor.

    Args:
        folder_fd: the directory.
        name: the name in it.
        path: the path of the directory, for messages.
        flags: how to open the file.

    Raises:
        ValueError: it is not a regular file with one name; or it is opened to write, and belongs to
            another user.
        OSError: the file system reported another error.
    """
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a FIFO would wait for its writer
    try:
        fd = os.open(name, flags | safe, 0o600, dir_fd=folder_fd)
    except OSError as error:
        if error.errno not in _KIND_BY_ERRNO:
            raise
        kind = _KIND_BY_ERRNO[error.errno]
    else:
        found, user = os.fstat(fd), os.geteuid()
        if stat.S_ISREG(found.st_mode) and found.st_nlink < 2:
            if found.st_uid == user or not flags & os.O_RDWR:
                os.set_blocking(fd, True)
                return fd
            kind = f"a file of user {found.st_uid} (this process is user {user})"
        elif found.st_nlink > 1:
            kind = "a file with several names (hard links)"
        else:
            kind = "not a regular file"
        os.close(fd)
    raise ValueError(
        f"path is {str(path)!r}, where {name!r} is {kind}; move it away, or give the tier a "
        "directory of its own"
    )
