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
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support import mooncake_holder
from tests.support.server_process import ServerProcess, free_port, free_ports
from tests.support.waiting import PATIENCE_S, eventually

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


def answers(port: int) -> bool:
    """Whether a process accepts connections at ``port``."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


class PoolProcess(ServerProcess):
    """One process of a pool. What it holds is lost when it is killed.

    Args:
        log: the file to which it writes.
        arguments: its command line.
    """

    def __init__(self, log: Path, arguments: Sequence[str]) -> None:
        super().__init__(log)
        self._arguments = list(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)

    def start(self) -> Self:
        """Start the process, also after ``kill``, and wait until it answers."""
        self.launch(
            self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"GLOG_logtostderr": "1"}, cwd=self.log.parent,
        )  # fmt: skip
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until the process answers."""
        raise NotImplementedError


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
        self.port, metrics_port = free_ports(2)
        super().__init__(
            folder / "master.log",
            [
                command("mooncake_master"),
                "--rpc_address=127.0.0.1",
                f"--rpc_port={self.port}",
                "--metrics_host=127.0.0.1",
                f"--metrics_port={metrics_port}",
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
