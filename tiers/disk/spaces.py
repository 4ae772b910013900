"""The file ``spaces``: which namespaces were reset, and what people may know of each.

A JSON object: ``reset`` has the random bytes of the last reset of a namespace, ``about`` the
description of each, under the name it has in this directory; both by hex.

Always true here: the file is replaced as a whole, and is on the disk when a call returns. So a
reset outlasts the end of the process at any moment, and a power cut.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from kvcache.keys import renamed

NAME: Final = "spaces"
DESCRIBED: Final = 256  # namespaces at most, those opened last
_RESET_NBYTES: Final = 16
_MOST_NBYTES: Final = 16 << 20


def resolve(path: Path, space: bytes, about: str) -> bytes:
    """What ``space`` is called in the directory ``path``; ``about`` is kept under that name.

    Raises:
        OSError, ValueError: when it cannot be known whether the namespace was reset.
    """
    found = read(path)
    called = renamed(space, bytes.fromhex(found["reset"].get(space.hex(), "")))
    described = found["about"]
    if about and described.get(called.hex()) != about:
        described.pop(called.hex(), None)
        described[called.hex()] = about
        while len(described) > DESCRIBED:
            del described[next(iter(described))]
        _write(path, found)
    return called


def forget(path: Path, space: bytes) -> None:
    """Give ``space`` another name in the directory ``path``, from the next opening on.

    Raises:
        OSError, ValueError: when that cannot be read or written.
    """
    found = read(path)
    found["reset"][space.hex()] = os.urandom(_RESET_NBYTES).hex()
    _write(path, found)


def read(path: Path) -> dict[str, dict[str, str]]:
    """What the file in the directory ``path`` has; empty where there is none.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is damaged.
    """
    try:
        file = os.open(path / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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


def _write(path: Path, found: dict[str, dict[str, str]]) -> None:
    new = path / f"{NAME}.new"
    new.unlink(missing_ok=True)  # a link that another user planted, or what a killed process left
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
        file.write(json.dumps(found).encode())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path / NAME)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
