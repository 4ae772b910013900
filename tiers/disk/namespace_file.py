"""The file ``spaces``: which namespaces were reset, and what people may know of each.

A JSON object: ``reset`` has the random bytes of the last reset of a namespace, ``about`` the
description of each, under the name it has in this directory; both by hex.

Always true here: the file is replaced as a whole, and is on the disk when a call returns. So a
reset outlasts the end of the process at any moment, and a power cut.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvcache.keys import namespace_after_reset
from kvcache.tiers.disk.safe_open import open_file

NAME: Final = "spaces"
_NEW: Final = "spaces.new"
FILES: Final = (NAME, _NEW)
DESCRIBED: Final = 256  # namespaces at most, those opened last
_RESET_NBYTES: Final = 16
_MOST_NBYTES: Final = 16 << 20


def resolve(folder: int, path: Path, namespace: bytes, about: str) -> bytes:
    """What ``namespace`` is called in a directory; ``about`` is kept there under that name.

    ``folder`` is the open directory, and ``path`` its path, for messages.

    Raises:
        OSError, ValueError: when it cannot be known whether the namespace was reset.
    """
    found = read(folder, path)
    called = namespace_after_reset(
        namespace, bytes.fromhex(found["reset"].get(namespace.hex(), ""))
    )
    described = found["about"]
    if about and described.get(called.hex()) != about:
        described.pop(called.hex(), None)
        described[called.hex()] = about
        while len(described) > DESCRIBED:
            del described[next(iter(described))]
        _write(folder, found)
    return called


def forget(folder: int, path: Path, namespace: bytes) -> None:
    """Give ``namespace`` another name in a directory, from the next opening on.

    Raises:
        OSError, ValueError: when that cannot be read or written.
    """
    found = read(folder, path)
    found["reset"][namespace.hex()] = os.urandom(_RESET_NBYTES).hex()
    _write(folder, found)


def read(folder: int, path: Path) -> dict[str, dict[str, str]]:
    """What the file has; nothing where there is none.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is not a file of this tier, or is damaged.
    """
    try:
        file = open_file(folder, NAME, path, os.O_RDONLY)
    except FileNotFoundError:
        return {"reset": {}, "about": {}}
    with os.fdopen(file, "rb") as opened:
        text = opened.read(_MOST_NBYTES)
    try:
        found: Any = json.loads(text)
        tables = {name: dict(found[name]) for name in ("reset", "about")}
        if all(isinstance(each, str) for table in tables.values() for each in table.values()):
            return tables
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{str(path / NAME)!r} is damaged; delete it together with the blocks there")


def _write(folder: int, found: dict[str, dict[str, str]]) -> None:
    with suppress(FileNotFoundError):  # a killed process left it
        os.unlink(_NEW, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_NEW, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(json.dumps(found).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(_NEW, NAME, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)
