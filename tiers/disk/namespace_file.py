"""The file ``spaces`` of a tier's directory: which namespaces were reset, and their descriptions.

A JSON object with two tables, keyed by the hex of a namespace: ``reset`` has the random bytes of
the namespace's last reset; ``about`` has the description of each namespace, under the name that it
has in this directory.

Invariants: the file is replaced as a whole, and is on the disk when a call returns. So a
reset survives a killed process and a power cut.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvcache.keys import RESET_NBYTES, namespace_after_reset
from kvcache.tiers.disk.safe_open import open_file

NAME: Final = "spaces"
_NEW_NAME: Final = "spaces.new"
FILE_NAMES: Final = (NAME, _NEW_NAME)
MAX_DESCRIPTIONS: Final = 256
"""The most descriptions that the file keeps; the oldest are deleted first."""
_MAX_FILE_NBYTES: Final = 16 << 20

Tables = dict[str, dict[str, str]]


def resolve(folder_fd: int, path: Path, namespace: bytes, about: str) -> bytes:
    """Return the name that ``namespace`` has in a directory; keep ``about`` under that name.

    Args:
        folder_fd: the open directory.
        path: its path, for messages.
        namespace: the namespace as the connector computed it.
        about: its description, as JSON; "" keeps none.

    Raises:
        OSError, ValueError: the file cannot be read or written.
    """
    tables = read(folder_fd, path)
    name = namespace_after_reset(namespace, bytes.fromhex(tables["reset"].get(namespace.hex(), "")))
    descriptions = tables["about"]
    if about and descriptions.get(name.hex()) != about:
        descriptions.pop(name.hex(), None)  # so that the new one is the last
        descriptions[name.hex()] = about
        while len(descriptions) > MAX_DESCRIPTIONS:
            del descriptions[next(iter(descriptions))]
        _write(folder_fd, tables)
    return name


def reset(folder_fd: int, path: Path, namespace: bytes) -> None:
    """Change the name that :func:`resolve` returns for ``namespace`` from now on.

    Raises:
        OSError, ValueError: the file cannot be read or written.
    """
    tables = read(folder_fd, path)
    tables["reset"][namespace.hex()] = os.urandom(RESET_NBYTES).hex()
    _write(folder_fd, tables)


def read(folder_fd: int, path: Path) -> Tables:
    """Return the two tables; empty ones if there is no file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or was not written by a tier.
    """
    try:
        fd = open_file(folder_fd, NAME, path, os.O_RDONLY)
    except FileNotFoundError:
        return {"reset": {}, "about": {}}
    with os.fdopen(fd, "rb") as file:
        text = file.read(_MAX_FILE_NBYTES)
    try:
        content: Any = json.loads(text)
        tables = {name: dict(content[name]) for name in ("reset", "about")}
        if all(isinstance(each, str) for table in tables.values() for each in table.values()):
            return tables
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{str(path / NAME)!r} is damaged; delete it together with the blocks there")


def _write(folder_fd: int, tables: Tables) -> None:
    with suppress(FileNotFoundError):  # a process that was killed may have left one
        os.unlink(_NEW_NAME, dir_fd=folder_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_NEW_NAME, flags, 0o600, dir_fd=folder_fd), "wb") as file:
        file.write(json.dumps(tables).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(_NEW_NAME, NAME, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    os.fsync(folder_fd)
