"""Calls of a tier's methods, checked: any failure of the tier becomes a ``TierError``.

A profile can name any class as a tier, so a method may raise and return anything.

Invariants:

* Every exception becomes a ``TierError``, also one that is no ``Exception``: ``SystemExit``, the
  ``CancelledError`` of asyncio, a panic of Rust. Only an exception that a signal raised is raised
  again.
* A result is checked and copied before any other code reads it: it has one element per key, each of
  the expected type.
* A ``TierError`` keeps no reference to the tier's exception: its traceback would keep the buffers
  alive.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from itertools import islice
from operator import index
from typing import TypeVar

from kvcache.secrets import redact

T = TypeVar("T")

_MAX_READ_CHARS = 4096  # of an exception's text
_TERMINATING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TierError(Exception):
    """A call of a tier's method failed.

    Attributes:
        error: the name of the exception's class.
        why: the text of the tier's exception, redacted by :func:`kvcache.secrets.redact`.
    """

    def __init__(self, error: str, why: str) -> None:
        super().__init__(f"{error}: {why}" if why else error)
        self.error = error
        self.why = why


def result_of(call: Callable[[], T]) -> T:
    """Return the result of ``call``. Raises TierError for any exception of it."""
    try:
        return call()
    except BaseException as error:
        if raised_by_signal(error):
            raise
        failure = describe_error(error)
    raise TierError(*failure)


def answers_per_key(
    call: Callable[[], Iterable[object]], keys: int, read: Callable[[object], T]
) -> list[T]:
    """Return the results of ``call``, one per key, each converted by ``read``.

    Args:
        call: returns an iterable.
        keys: how many keys the caller passed.
        read: converts a result, and raises if it has a wrong type or value.

    Raises:
        TierError: if the call fails, returns more or fewer results, or one cannot be converted.
    """

    def read_all() -> list[T]:
        results = list(islice(call(), keys + 1))  # a generator may not end
        if len(results) != keys:
            found = len(results) if len(results) < keys else f"more than {keys}"
            raise ValueError(f"{found} answers to {keys} keys")
        return [read(each) for each in results]

    return result_of(read_all)


def as_count(value: object) -> int:
    """Convert a count of any integer type to an int. Raises any exception for other values."""
    number = index(value)  # type: ignore[arg-type]
    if isinstance(value, bool) or number < 0:
        raise ValueError(f"{value} is no count")
    return int(number)


def byte_count_reader(buffer_nbytes: int) -> Callable[[object], int]:
    """A reader of the number of bytes that a tier wrote into a buffer of ``buffer_nbytes``."""

    def read(value: object) -> int:
        if (number := as_count(value)) > buffer_nbytes:
            raise ValueError(f"{number} bytes in a buffer of {buffer_nbytes} bytes")
        return number

    return read


def describe_error(error: BaseException) -> tuple[str, str]:
    """The name of an exception's class and its text: short, printable and without secrets."""
    try:
        return type(error).__name__, redact(str(error)[:_MAX_READ_CHARS])
    except BaseException:  # noqa: BLE001 - ``__str__`` may raise anything
        return "Exception", "its text cannot be read"


def raised_by_signal(error: BaseException) -> bool:
    """Whether a signal handler raised ``error``, and not the code that it interrupted.

    Handlers run in the main thread only: the one of Ctrl-C raises ``KeyboardInterrupt``, those of
    the application raise anything. If these were suppressed, an engine could not be stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = {
        getattr(signal.getsignal(number), "__code__", None) for number in _TERMINATING_SIGNALS
    }
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))
