"""What classes of others may raise and return, for tests of what calls them."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


class PanicException(BaseException):  # as pyo3 names it
    """What a panic of Rust becomes in Python: no ``Exception``."""


class UnreadableError(Exception):
    """Its text cannot be had either."""

    def __str__(self) -> str:
        raise PanicException("str() fails as well")


class Unusable:
    """A value of which every use raises."""

    def _raise(self, *_: object) -> NoReturn:
        raise PanicException("this value cannot be used")

    __bool__ = __len__ = __iter__ = __index__ = __int__ = __float__ = __repr__ = _raise
    __eq__ = __ne__ = __lt__ = __gt__ = __add__ = __radd__ = _raise
    __hash__ = _raise


class Ambiguous:
    """As an array of NumPy that has several elements."""

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")


RAISED: dict[str, Callable[[], BaseException]] = {
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


def _breaks_off(count: int) -> Iterator[object]:
    yield from [1] * (count - 1)
    raise PanicException("the generator breaks off")


RETURNED: dict[str, Callable[[int], Any]] = {
    "None": lambda _: None,
    "True": lambda _: True,
    "a number": lambda _: 4096,
    "nothing": lambda _: [],
    "one too few": lambda count: [1] * (count - 1),
    "one too many": lambda count: [1] * (count + 1),
    "endless": lambda _: _endless(1),
    "a generator that raises": _breaks_off,
    "a coroutine's future": lambda _: concurrent.futures.Future(),
    "unusable": lambda _: Unusable(),
    "unusable elements": lambda count: [Unusable()] * count,
    "arrays": lambda count: [Ambiguous()] * count,
}
"""Answers, for so many keys, that are no answers of any method."""

COUNTED: dict[str, Callable[[int], Any]] = {
    "None elements": lambda count: [None] * count,
    "nan": lambda count: [float("nan")] * count,
    "floats": lambda count: [4096.0] * count,
    "bools": lambda count: [True] * count,
    "negative": lambda count: [-1] * count,
    "too large": lambda count: [4097] * count,
    "huge": lambda count: [1 << 80] * count,
    "text": lambda count: ["4096"] * count,
}
"""Answers that are no numbers of bytes of a block of one page."""
