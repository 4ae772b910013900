"""Keys, block contents, threads and log records for the contract suites.

Invariant: the bytes of a block are derived from its key, so a block under a wrong key is noticed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b, shake_128


def keys_of(name: str, count: int, nbytes: int = 32) -> list[bytes]:
    """Return ``count`` keys of ``nbytes`` bytes, different for each name."""
    digest_nbytes = min(nbytes, 64)
    digests = [
        blake2b(f"{name}/{number}".encode(), digest_size=digest_nbytes).digest()
        for number in range(count)
    ]
    return [digest.ljust(nbytes, b"+") for digest in digests]


def block_of(key: bytes, nbytes: int) -> bytes:
    """Return the ``nbytes`` bytes that the tests store under ``key``."""
    return shake_128(key).digest(nbytes)


def run_in_threads(threads: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(threads - 1)`` in parallel threads, and raise their exceptions."""
    all_started = threading.Barrier(threads)

    def begin(thread: int) -> None:
        all_started.wait()
        work(thread)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, range(threads)))


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that gets the messages logged inside the block, from level WARNING."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    collector, root = Collector(logging.WARNING), logging.getLogger()
    root.addHandler(collector)
    try:
        yield messages
    finally:
        root.removeHandler(collector)
