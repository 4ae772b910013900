"""Runs code in forked child processes, for tests of objects that a child must not use."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from kvcache.process import ForkedError

TIMEOUT_S = 60.0  # ends the test of a broken child; no measure of speed


@contextmanager
def ignore_fork_warnings() -> Iterator[None]:
    """Ignore the warnings of newer interpreters about forks in a process with threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def run_in_child(call: Callable[[], Any]) -> Any:
    """Return the result of ``call`` in a forked child, which exits as multiprocessing does it."""
    parent_end, child_end = multiprocessing.Pipe()

    def run(pipe: Connection) -> None:
        try:
            pipe.send((call(), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
            raise

    child = multiprocessing.get_context("fork").Process(target=run, args=(child_end,))
    with ignore_fork_warnings():
        child.start()
    child_end.close()
    try:
        assert parent_end.poll(TIMEOUT_S), "the child hangs"
        value, failure = parent_end.recv()
    finally:
        child.join(TIMEOUT_S)
        child.kill()
        child.join()
    assert failure is None, failure
    assert child.exitcode == 0
    return value


def methods_usable_in_child(*opened: object) -> list[str]:
    """Return the public methods of ``opened`` that do not raise ForkedError in a forked child.

    The child also closes the objects.
    """

    def attempt() -> list[str]:
        found = []
        for each in opened:
            for name in dir(type(each)):
                method = getattr(type(each), name)
                if name.startswith("_") or name == "close" or not callable(method):
                    continue
                if getattr(method, "__self__", None) is not None:
                    continue  # a class method, which opens another object
                try:
                    getattr(each, name)()
                except ForkedError:
                    pass
                else:
                    found.append(f"{type(each).__name__}.{name}")
            each.close()  # type: ignore[attr-defined]
        gc.collect()
        return found

    found: list[str] = run_in_child(attempt)
    return found
