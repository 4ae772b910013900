"""Keys, block contents and threads for the contract suites.

Always true: the bytes of a block are derived from its key, so a block under a wrong key is noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, shake_128


def keys_of(name: str, count: int, nbytes: int = 32) -> list[bytes]:
    """Return ``count`` keys of ``nbytes`` bytes (at most 64), different for each name."""
    return [
        blake2b(f"{name}/{number}".encode(), digest_size=nbytes).digest() for number in range(count)
    ]


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
