"""Starts, stops and kills the parts of a Mooncake pool on loopback.

A pool is a master, which knows where each block is, and holders, which lend memory to it. Each is a
process of its own. A test may also start the host's daemon, through which clients share memory.

    with mooncake_pool.pool(folder) as pool:
        MooncakeTier(**pool.options())
        pool.master.kill(), pool.master.start()
        with pool.holders[0].stopped(): ...
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support import marks, mooncake_holder

PATIENCE_S = 60.0  # bounds the wait of broken code; not a measurement
TIMEOUT_S = 30.0  # of tiers
LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
"""The shared libraries that the package needs, and the Debian packages that have them."""


def skip_without_package() -> None:
    """Skip the test, with the reason, where Mooncake cannot run."""
    if find_spec("mooncake") is None:
        pytest.skip("no Mooncake; pip install mooncake-transfer-engine-non-cuda installs it")
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            pytest.skip(f"no {library}, which Mooncake needs; apt-get install {package}")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition()`` is true; fail if that takes too long."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"timed out: {what}"
        time.sleep(0.05)


def free_port() -> int:
    """Return a port that is free.

    It is below the ports that the system gives to clients, so it stays free while a server is down;
    and not one of those that Mooncake's clients take for themselves, 12300 to 14300.
    """
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def answers(port: int) -> bool:
    """Whether a process accepts connections at ``port``."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


class PoolProcess:
    """One process of a pool, which can be stopped and killed.

    Args:
        log: the file to which it writes.
        arguments: its command line.
    """

    def __init__(self, log: Path, arguments: Sequence[str]) -> None:
        self._log = log
        self._arguments = list(arguments)
        self._process: subprocess.Popen[str] | None = None
        log.parent.mkdir(parents=True, exist_ok=True)

    def start(self) -> Self:
        """Start the process, also after ``kill``, and wait until it answers."""
        marks.require("server")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=os.environ | {"GLOG_logtostderr": "1"}, cwd=self._log.parent,
            )  # fmt: skip
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until the process answers."""
        raise NotImplementedError

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def check_runs(self) -> None:
        """Fail with the end of its log if the process has ended."""
        if self.process.poll() is not None:
            log = self._log.read_text(errors="replace")
            raise AssertionError(f"{self._arguments[0]} ended: {log[-2000:]}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process. What it held is lost."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self._process.wait()
            self._process = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the process: it does not answer, and its connections stay open."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


def command(name: str) -> str:
    """Return the path of a program of the package."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found, f"the package has no {name}"
    return found


class Master(PoolProcess):
    """The master of a pool.

    Args:
        folder: for its log.
        lease_ms: how long a block that was looked up or read cannot be evicted or removed.
        client_ttl_s: after how long without a sign of life the master forgets a client.
        options: more of its arguments.
    """

    def __init__(
        self, folder: Path, *options: str, lease_ms: int = 1000, client_ttl_s: int = 3
    ) -> None:
        self.port = free_port()
        super().__init__(
            folder / "master.log",
            [
                command("mooncake_master"),
                "--rpc_address=127.0.0.1",
                f"--rpc_port={self.port}",
                "--metrics_host=127.0.0.1",
                f"--metrics_port={free_port()}",
                f"--default_kv_lease_ttl={lease_ms}",
                f"--client_ttl={client_ttl_s}",
                *options,
            ],
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        def ready() -> bool:
            self.check_runs()
            return answers(self.port)

        eventually(ready, "the master answers")


class Holder(PoolProcess):
    """A client that lends memory to a pool, and calls the pool for a test.

    Args:
        folder: for its log.
        master: the address of the master.
        nbytes: how much memory it lends.
    """

    def __init__(self, folder: Path, master: str, nbytes: int) -> None:
        settings = {
            "local_hostname": "127.0.0.1",
            "metadata_server": "P2PHANDSHAKE",
            "global_segment_size": nbytes,
            "local_buffer_size": 16 << 20,
            "protocol": "tcp",
            "rdma_devices": "",
            "master_server_addr": master,
        }
        program = [sys.executable, mooncake_holder.__file__, json.dumps(settings)]
        super().__init__(folder / "holder.log", program)

    def wait_ready(self) -> None:
        code = self._answer()
        assert code == 0, f"a client cannot be opened: {code}"

    def call(self, name: str, *arguments: object) -> Any:
        """Call a method of Mooncake's client in the holder's process; bytes are hex."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def put(self, name: str, value: bytes) -> None:
        """Put a value, which is not changed if ``name`` exists."""
        assert self.call("put", name, value.hex()) == 0

    def get(self, name: str) -> bytes:
        """Return a value; empty if there is none."""
        return bytes.fromhex(self.call("get", name))

    def exists(self, name: str) -> bool:
        return bool(self.call("is_exist", name) == 1)

    def clear(self) -> None:
        """Remove everything from the pool. No other client may read meanwhile."""
        self.call("remove_all", True)

    def _answer(self) -> Any:
        output = self.process.stdout
        assert output is not None
        until = time.monotonic() + PATIENCE_S
        while True:
            assert select.select([output], [], [], max(0.0, until - time.monotonic()))[0], "hangs"
            line = output.readline()
            if not line:
                self.process.wait()
                self.check_runs()
            if line.startswith(mooncake_holder.ANSWER):
                return json.loads(line.removeprefix(mooncake_holder.ANSWER))


class Daemon(PoolProcess):
    """The daemon of a host: it lends memory, and copies for the clients of this host.

    Args:
        folder: for its log.
        master: the address of the master.
        nbytes: how much memory it lends.
    """

    def __init__(self, folder: Path, master: str, nbytes: int) -> None:
        self.port = free_port()
        super().__init__(
            folder / "daemon.log",
            [
                command("mooncake_client"),
                "--host=127.0.0.1",
                f"--port={self.port}",
                f"--global_segment_size={nbytes} B",
                f"--master_server_address={master}",
                "--metadata_server=P2PHANDSHAKE",
                "--protocol=tcp",
            ],
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        def ready() -> bool:
            self.check_runs()
            return answers(self.port)

        eventually(ready, "the daemon answers")


class Pool:
    """A master and its holders.

    Args:
        master: the master, not started.
        holders: the holders, not started.

    Attributes:
        master: the master.
        holders: the holders.
    """

    def __init__(self, master: Master, holders: Sequence[Holder]) -> None:
        self.master = master
        self.holders = list(holders)

    def start(self) -> Self:
        for each in (self.master, *self.holders):
            each.start()
        return self

    def kill(self) -> None:
        for each in (*self.holders, self.master):
            each.kill()

    def clear(self) -> None:
        """Remove everything from the pool. No client may read meanwhile."""
        assert self.holders, "the pool has no client that could do it"
        self.holders[0].clear()

    def options(self, **options: Any) -> dict[str, Any]:
        """Return options of a tier in this pool.

        The first tier of a process sets the library's timeouts, so ``timeout_s`` is the same here
        for all tests of a process.
        """
        return {"master": self.master.address, "timeout_s": TIMEOUT_S, **options}

    def variables(self, tier: str, **options: Any) -> dict[str, str]:
        """Return variables that set these options of the tier named ``tier`` in a profile."""
        return {
            f"KVCACHE__{tier.upper()}__{name.upper()}": str(value)
            for name, value in self.options(**options).items()
        }


@contextmanager
def pool(
    folder: Path, *options: str, holders: Sequence[int] = (64 << 20,), **settings: Any
) -> Iterator[Pool]:
    """Start a master and a holder for each number of bytes in ``holders``; kill them at the end.

    ``options`` and ``settings`` are those of :class:`Master`.
    """
    skip_without_package()
    master = Master(folder, *options, **settings)
    parts = [
        Holder(folder / f"holder-{number}", master.address, nbytes)
        for number, nbytes in enumerate(holders)
    ]
    started = Pool(master, parts)
    try:
        yield started.start()
    finally:
        started.kill()


@contextmanager
def daemon(folder: Path, started: Pool, nbytes: int = 64 << 20) -> Iterator[Daemon]:
    """Start the daemon of a host in a pool; kill it at the end."""
    with ExitStack() as running:
        own = Daemon(folder, started.master.address, nbytes)
        running.callback(own.kill)
        yield own.start()
