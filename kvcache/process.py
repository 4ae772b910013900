"""Binds an object to the process that opened it, so that a forked child cannot use it.

A forked child has a copy of every index and lease, and shares the memory, the files and the sockets
behind them. Two copies that choose slots independently overwrite each other's blocks.

Invariants:

* In a child that Python forked (``os.fork``, ``multiprocessing``), every public method of a bound
  object of the parent raises :class:`ForkedError`, and ``close`` does nothing.
* The child releases nothing that belongs to the parent: it never collects a bound object.
* Calls in the parent pay nothing: the class of bound objects is replaced when the child starts.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from inspect import isfunction
from typing import Any, Final, NoReturn
from weakref import WeakSet

_RELEASE: Final = "_release_in_child"
"""The method that closes the child's copies of descriptors. It must take no lock: another thread of
the parent may have held it during the fork."""

_bound: WeakSet[Any] = WeakSet()
_pid = os.getpid()
generation = 0
"""How many forks there are between the first process and this one."""


class ForkedError(RuntimeError):
    """An object was used in a fork of the process that opened it."""


def bind_to_process(opened: object) -> None:
    """Make ``opened`` unusable in every child that is forked from now on.

    In the child its public methods raise :class:`ForkedError` and ``close`` does nothing. If it has
    a method ``_release_in_child``, the child calls that first.
    """
    _bound.add(opened)


def _begin_child() -> None:
    global _pid, generation
    parent, _pid = _pid, os.getpid()
    generation += 1
    inherited = list(_bound)
    _bound.clear()
    for each in inherited:
        # This reference is never released, so that the object is never collected: its destructor
        # would unmap memory that the child does not have, or log out of a server.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
        kind: Any = type(each)
        # A third-party subclass may refuse either step; the other objects must still be handled.
        with suppress(Exception):
            getattr(kind, _RELEASE, bool)(each)
        with suppress(Exception):
            object.__setattr__(each, "__class__", _refusing(kind, parent))


@cache
def _refusing(kind: type, parent: int) -> type:
    """A subclass of ``kind`` for the child: the same memory layout, but public methods raise."""

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
