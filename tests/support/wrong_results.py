"""Exceptions and wrong results of third-party classes, for tests of the code that calls them."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


class PanicException(BaseException):  # the name that pyo3 uses
    """A panic of Rust, which is no ``Exception`` in Python."""


class UnreadableError(Exception):
    """An exception that raises another one in ``str()``."""

    def __str__(self) -> str:
        raise PanicException("str() fails as well")


class Unusable:
    """A value that raises on every use."""

    def _raise(self, *_: object) -> NoReturn:
        raise PanicException("this value cannot be used")

    __bool__ = __len__ = __iter__ = __index__ = __int__ = __float__ = __repr__ = _raise
    __eq__ = __ne__ = __lt__ = __gt__ = __add__ = __radd__ = _raise
    __hash__ = _raise


class Ambiguous:
    """A value without a truth value, like a NumPy array with several elements."""

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "OSError": OSError,
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "StopIteration": StopIteration,
    "MemoryError": MemoryError,
    "asyncio.CancelledError": asyncio.CancelledError,
    "futures.CancelledError": concurrent.futures.CancelledError,
    "TimeoutError": TimeoutError,
    "ExceptionGroup": lambda: BaseExceptionGroup("several", [SystemExit(), OSError()]),
    "panic": lambda: PanicException("called `Option::unwrap()` on a `None` value"),
    "unreadable": UnreadableError,
    "long": lambda: OSError("\x1b[31m" * 10_000),
}
"""Exceptions by name."""


def _endless(value: object) -> Iterator[object]:
    while True:
        yield value


def _raising(count: int) -> Iterator[object]:
    yield from [1] * (count - 1)
    raise PanicException("the generator raises")


WRONG_RESULTS: dict[str, Callable[[int], Any]] = {
    "None": lambda _: None,
    "True": lambda _: True,
    "a number": lambda _: 4096,
    "nothing": lambda _: [],
    "one too few": lambda count: [1] * (count - 1),
    "one too many": lambda count: [1] * (count + 1),
    "endless": lambda _: _endless(1),
    "a generator that raises": _raising,
    "a coroutine's future": lambda _: concurrent.futures.Future(),
    "unusable": lambda _: Unusable(),
    "unusable elements": lambda count: [Unusable()] * count,
    "arrays": lambda count: [Ambiguous()] * count,
}
"""Results, for a number of keys, that are wrong for every method."""

WRONG_BYTE_COUNTS: dict[str, Callable[[int], Any]] = {
    "None elements": lambda count: [None] * count,
    "nan": lambda count: [float("nan")] * count,
    "floats": lambda count: [4096.0] * count,
    "bools": lambda count: [True] * count,
    "negative": lambda count: [-1] * count,
    "too large": lambda count: [4097] * count,
    "huge": lambda count: [1 << 80] * count,
    "text": lambda count: ["4096"] * count,
}
"""Results, for a number of keys, that are wrong numbers of bytes for a block of one page."""
