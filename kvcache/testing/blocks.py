"""What the suites are made with: keys, the block that belongs to a key, threads at once.

Always true: a block's bytes are made from its key, so a block that comes back under another key is
seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, shake_128


def keys_of(name: str, count: int, nbytes: int = 32) -> list[bytes]:
    """``count`` keys of ``nbytes`` bytes (at most 64) that no other name gives."""
    return [blake2b(f"{name}/{at}".encode(), digest_size=nbytes).digest() for at in range(count)]


def block_of(key: bytes, nbytes: int) -> bytes:
    """The ``nbytes`` bytes that the tests keep under ``key``."""
    return shake_128(key).digest(nbytes)


def run_in_threads(threads: int, work: Callable[[int], None]) -> None:
    """Run ``work(0) ... work(threads - 1)`` in as many threads at once; raise what one raised."""
    start = threading.Barrier(threads)

    def begin(thread: int) -> None:
        start.wait()
        work(thread)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, range(threads)))
