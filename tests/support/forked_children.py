"""Children that are forked for real, for tests of parts that a fork must not use."""

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

PATIENCE_S = 60.0  # a bound for broken code, not a measure


@contextmanager
def may_fork() -> Iterator[None]:
    """Newer interpreters warn of forks beside threads, which is what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def in_child(call: Callable[[], Any]) -> Any:
    """What ``call`` returns in a forked child, which ends as children of multiprocessing do."""
    ours, theirs = multiprocessing.Pipe()

    def run(answer: Connection) -> None:
        try:
            answer.send((call(), None))
        except BaseException:
            answer.send((None, traceback.format_exc()))
            raise

    child = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    with may_fork():
        child.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE_S), "the child hangs"
        value, failure = ours.recv()
    finally:
        child.join(PATIENCE_S)
        child.kill()
        child.join()
    assert failure is None, failure
    assert child.exitcode == 0
    return value


def unrefused(*parts: object) -> list[str]:
    """The public methods of ``parts`` that a forked child may call; it closes them, too."""

    def attempt() -> list[str]:
        found = []
        for part in parts:
            for name in dir(type(part)):
                method = getattr(type(part), name)
                if name.startswith("_") or name == "close" or not callable(method):
                    continue
                if getattr(method, "__self__", None) is not None:
                    continue  # a class method, which opens another one
                try:
                    getattr(part, name)()
                except ForkedError:
                    pass
                else:
                    found.append(f"{type(part).__name__}.{name}")
            part.close()  # type: ignore[attr-defined]
        gc.collect()
        return found

    found: list[str] = in_child(attempt)
    return found
