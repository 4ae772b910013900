"""A played client of Mooncake's library: its methods over a dictionary, with its traps.

It plays what a test without RDMA, or without waiting a minute, cannot make the library do. As the
library was seen to do, it writes only the last buffer of a key that is twice in a batch, keeps the
last value of a key that is put twice in a batch, and refuses to remove leased keys. A call after
``close``, which crashes the process, is recorded in ``violations``.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.mooncake import MooncakeTier, library
from tests.support.tcp_server import TcpServer

PATIENCE_S = 30.0  # bounds the wait of broken code
OpenPlayed = Callable[..., MooncakeTier]
ABSENT, LEASED, INVALID = -704, -706, -600


class PlayedMaster(TcpServer):
    """Closes each connection at once, as a master does that cannot read a request."""

    def serve(self, sock: Any) -> None:
        sock.recv(1)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class HangingMaster(TcpServer):
    """Accepts connections and answers none, as the system does for a process that hangs."""

    def serve(self, sock: Any) -> None:
        self.closing.wait()


class PlayedPool:
    """What the clients of one pool share, and the calls that they got.

    Attributes:
        values: the value of each name.
        leased: names that cannot be removed.
        calls: the name of each method and its arguments, in order.
        violations: what would crash the process or return wrong bytes.
        replies: for each method a function that is called instead of the played one.
        registered: address and size of memory that a client registered, for each client.
        only_registered: whether other memory is refused, as with RDMA and with a daemon.
        setup_code: what ``setup`` returns.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.leased: set[str] = set()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.violations: list[str] = []
        self.replies: dict[str, Callable[..., Any]] = {}
        self.clients: list[PlayedClient] = []
        self.only_registered = False
        self.setup_code = 0

    def library(self, timeout_s: float) -> Callable[[], PlayedClient]:
        """Stand for ``load_library``: return what makes a client of this pool."""
        return lambda: PlayedClient(self)

    def called(self, method: str) -> list[tuple[Any, ...]]:
        """Return the arguments of each call of ``method``."""
        return [arguments for name, arguments in self.calls if name == method]


class PlayedClient:
    """One client of a played pool."""

    def __init__(self, pool: PlayedPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._inside = 0
        self.closed = False
        self.registered: dict[int, int] = {}
        self._mapped: list[Any] = []
        pool.clients.append(self)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            pool = self._pool
            with self._lock:
                if self.closed:
                    pool.violations.append(f"{method} after close")
                self._inside += 1
                pool.calls.append((method, arguments))
            try:
                play = pool.replies.get(method) or getattr(self, f"play_{method}")
                return play(*arguments)
            finally:
                with self._lock:
                    self._inside -= 1

        return call

    def close(self) -> None:
        with self._lock:
            if self._inside:
                self._pool.violations.append("close during a call")
            if self.closed:
                self._pool.violations.append("close twice")
            self.closed = True

    def play_setup(self, settings: dict[str, Any]) -> int:
        return self._pool.setup_code

    def play_setup_dummy(self, pool_nbytes: int, buffer_nbytes: int, address: str) -> int:
        return self._pool.setup_code

    def play_register_buffer(self, address: int, nbytes: int) -> int:
        if address in self.registered:
            return INVALID
        self.registered[address] = nbytes
        return 0

    def play_unregister_buffer(self, address: int) -> int:
        return 0 if self.registered.pop(address, 0) else INVALID

    def play_alloc_from_mem_pool(self, nbytes: int) -> int:
        self._mapped.append(ctypes.create_string_buffer(nbytes))
        return ctypes.addressof(self._mapped[-1])

    def play_batch_is_exist(self, names: Sequence[str]) -> list[int]:
        return [int(name in self._pool.values) for name in names]

    def play_get_size(self, name: str) -> int:
        return len(self._pool.values[name]) if name in self._pool.values else ABSENT

    def play_batch_get_into(
        self, names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        if len(set(names)) < len(names):
            self._pool.violations.append("a key twice in a batch of loads")
        codes = []
        for name, address, size in zip(names, addresses, sizes, strict=True):
            value = self._pool.values.get(name)
            if value is None:
                codes.append(ABSENT)
            elif len(value) > size or not self._may_transfer(address, size):
                codes.append(INVALID)
            else:
                ctypes.memmove(address, value, len(value))
                codes.append(len(value))
        return codes

    def play_batch_put_from(
        self, names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        if len(set(names)) < len(names):
            self._pool.violations.append("a key twice in a batch of stores")
        held = set(self._pool.values)
        new = [name not in held for name in names]
        return self._put(names, addresses, sizes, new)

    def play_batch_upsert_from(
        self, names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        return self._put(names, addresses, sizes, [True] * len(names))

    def play_batch_remove(self, names: Sequence[str], force: bool) -> list[int]:
        if force:
            self._pool.violations.append("a removal by force")
        codes = []
        for name in names:
            if name in self._pool.leased:
                codes.append(LEASED)
            else:
                codes.append(0 if self._pool.values.pop(name, None) else ABSENT)
        return codes

    def _put(
        self,
        names: Sequence[str],
        addresses: Sequence[int],
        sizes: Sequence[int],
        write: Sequence[bool],
    ) -> list[int]:
        codes = []
        for name, address, size, is_new in zip(names, addresses, sizes, write, strict=True):
            if not self._may_transfer(address, size):
                codes.append(INVALID)
                continue
            if is_new:
                self._pool.values[name] = ctypes.string_at(address, size)
            codes.append(0)
        return codes

    def _may_transfer(self, address: int, nbytes: int) -> bool:
        return not self._pool.only_registered or any(
            start <= address and address + nbytes <= start + size
            for start, size in self.registered.items()
        )


def play_library(monkeypatch: pytest.MonkeyPatch) -> PlayedPool:
    """Put a played pool in the place of Mooncake's library."""
    pool = PlayedPool()
    monkeypatch.setattr(library, "load_library", pool.library)
    return pool


@contextmanager
def tiers_on(played: PlayedPool, master: PlayedMaster) -> Iterator[OpenPlayed]:
    """Open tiers on the played library; check at the end that they kept its rules."""
    tiers: list[MooncakeTier] = []

    def opened(**options: Any) -> MooncakeTier:
        defaults: dict[str, Any] = {"master": master.address, "timeout_s": PATIENCE_S}
        tiers.append(MooncakeTier(**(defaults | options)))
        return tiers[-1]

    yield opened
    for tier in tiers:
        tier.close()
    assert played.violations == []


def wait_until_open(tier: MooncakeTier) -> None:
    """Wait until the tier has a client."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            tier.contains(keys_of("open", 1))
        except ConnectionError:
            assert time.monotonic() < until, "the tier does not open"
            time.sleep(0.01)
        else:
            return
