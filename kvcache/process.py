"""The process that a part belongs to: the one that opened it, and no fork of it.

A forked child has a copy of every index and lease, and shares the memory, the files and the sockets
behind them: two copies that choose slots by themselves overwrite each other's blocks.

Always true here:

* In a child that Python forked (``os.fork``, ``multiprocessing``), every public method of a part of
  the parent raises :class:`ForkedError`, and ``close`` does nothing.
* The child ends nothing of the parent: no part of the parent is collected in the child.
* No call pays for this: parts of the parent change their class when the child begins.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from inspect import isfunction
from typing import Any, Final, NoReturn
from weakref import WeakSet

_IN_CHILD: Final = "_release_in_child"
"""A method that is called first in a child. It takes no lock: another thread may have held it."""

_parts: WeakSet[Any] = WeakSet()
_pid = os.getpid()
generation = 0
"""How many forks lie between the first process and this one."""


class ForkedError(RuntimeError):
    """A part was used in a fork of the process that opened it."""


def bind_to_process(part: object) -> None:
    """Refuse ``part`` to every child that is forked from now on.

    In a child its public methods raise :class:`ForkedError`, ``close`` does nothing, and a method
    ``_release_in_child``, if it has one, closes the child's copies of descriptors first.
    """
    _parts.add(part)


def _begin_child() -> None:
    global _pid, generation
    parent, _pid = _pid, os.getpid()
    generation += 1
    parts = list(_parts)
    _parts.clear()
    for part in parts:
        # Never collected: memory that a fork leaves out is not the child's to unmap, and what the
        # part refers to must not say farewell to a server.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))
        kind: Any = type(part)
        # A third-party subclass may allow neither. It must cost no other part.
        with suppress(Exception):
            getattr(kind, _IN_CHILD, bool)(part)
        with suppress(Exception):
            object.__setattr__(part, "__class__", _refused(kind, parent))


@cache
def _refused(kind: type, parent: int) -> type:
    """``kind`` as a child has it: the same memory layout, and methods that refuse."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise ForkedError(
            f"this {kind.__name__} belongs to process {parent}, from which process {os.getpid()} "
            "was forked; open one of its own in each process"
        )

    public = {
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isfunction(value) and not name.startswith("_")
    }
    body: dict[str, object] = dict.fromkeys(public, refuse)
    body |= {"__slots__": (), "__module__": kind.__module__, "close": lambda *_, **__: None}
    return type(kind)(kind.__name__, (kind,), body)


os.register_at_fork(after_in_child=_begin_child)
