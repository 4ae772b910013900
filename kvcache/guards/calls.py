"""Calls of a tier's methods, checked: what a tier does wrong ends here, as one ``TierError``.

A tier is any class that a profile names, so that it may raise and return anything.

Always true here:

* Every exception becomes a ``TierError``, also one that is no ``Exception``: ``SystemExit``, the
  ``CancelledError`` of asyncio, a panic of Rust. Only what a signal raises is raised again.
* An answer is checked and copied before anything else reads it: there is one element per key, and
  each is of its type.
* A ``TierError`` keeps no reference to the tier's exception, whose traceback holds the buffers.
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

_READ = 4096  # characters of an exception's text
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a process


class TierError(Exception):
    """A call of a tier's method failed.

    Attributes:
        error: the kind of failure, in a word.
        why: the text of the tier's exception: as :func:`kvcache.secrets.redact` makes it.
    """

    def __init__(self, error: str, why: str) -> None:
        super().__init__(f"{error}: {why}" if why else error)
        self.error = error
        self.why = why


def result_of(call: Callable[[], T]) -> T:
    """What ``call`` returns. Raises TierError for whatever it raises."""
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
    """The answers of ``call``, one for each of so many ``keys``, as ``read`` reads them.

    Raises:
        TierError: when the call fails, there are more or fewer answers, or one cannot be read.
    """

    def given() -> list[T]:
        found = list(islice(call(), keys + 1))  # a generator may not end
        if len(found) != keys:
            some = len(found) if len(found) < keys else f"more than {keys}"
            raise ValueError(f"{some} answers to {keys} keys")
        return [read(each) for each in found]

    return result_of(given)


def as_count(given: object) -> int:
    """``given`` as a count; NumPy's integers are taken too. Raises anything for what is none."""
    number = index(given)  # type: ignore[arg-type]
    if isinstance(given, bool) or number < 0:
        raise ValueError(f"{given} is no count")
    return int(number)


def byte_count_reader(room: int) -> Callable[[object], int]:
    """A reader of the number of bytes that a tier has written into a buffer of ``room`` bytes."""

    def read(given: object) -> int:
        if (number := as_count(given)) > room:
            raise ValueError(f"{number} bytes in a buffer of {room} bytes")
        return number

    return read


def describe_error(error: BaseException) -> tuple[str, str]:
    """The kind of an exception in a word, and its text: short, printable, and without secrets."""
    try:
        return type(error).__name__, redact(str(error)[:_READ])
    except BaseException:  # noqa: BLE001 - a class may raise in its own ``__str__``
        return "Exception", "its text cannot be read"


def raised_by_signal(error: BaseException) -> bool:
    """Whether a signal raised ``error``, rather than the code that it interrupted.

    Signals raise in the main thread alone: Ctrl-C a ``KeyboardInterrupt``, and the application's
    handlers what they like. To swallow that would keep an engine from ending.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in _ENDING}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))
