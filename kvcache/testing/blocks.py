"""Keys, block contents and threads for the contract suites.

Invariant: the bytes of a block are derived from its key, so a block under a wrong key is noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
