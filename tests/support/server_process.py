"""A server in a process of its own, which a test stops, kills and starts again."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import marks

SECOND_PORT_OFFSET = 10000
"""From a port to the one that a Redis cluster's node, or a part of SeaweedFS, takes besides it."""

_BECOME_SERVER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Has the kernel kill this process when the test run ends, and turns it into the server."""


def free_ports(count: int) -> list[int]:
    """Return ports that are free, as are those ``SECOND_PORT_OFFSET`` above.

    They are below the ports that the system gives to clients, so they stay free while a server is
    down; and not those that Mooncake's clients take for themselves, 12300 to 14300.
    """
    with ExitStack() as sockets:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(15000, 32000 - SECOND_PORT_OFFSET)
            with suppress(OSError):
                for each in (port, port + SECOND_PORT_OFFSET):
                    listener = sockets.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", each))
                ports.append(port)
        return ports


def free_port() -> int:
    """Return one port as :func:`free_ports` does."""
    return free_ports(1)[0]


_starter = ThreadPoolExecutor(1, "server-starter")
"""Starts every process: the kernel kills a process when the thread that started it ends."""


class ServerProcess:
    """A process that a test can stop, kill and start again.

    The kernel kills it when the test run ends, also if the test run itself is killed.

    Args:
        log: the file to which it writes; each start appends to it.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[str] | None = None

    def launch(self, arguments: Sequence[str | Path], **options: Any) -> None:
        """Start the process. Both output streams go to the log, unless ``options`` change that.

        Args:
            arguments: the path of the program, and its arguments.
            options: those of :class:`subprocess.Popen`.
        """
        marks.require("server")
        launcher = [sys.executable, "-IS", "-c", _BECOME_SERVER, str(os.getpid())]
        with self.log.open("ab") as log:
            settings = {"stdout": log, "stderr": log, "text": True, **options}
            start = partial(subprocess.Popen[str], [*launcher, *map(str, arguments)], **settings)
            self._process = _starter.submit(start).result()

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
            log = self.log.read_text(errors="replace")
            raise AssertionError(f"{type(self).__name__} ended: {log[-2000:]}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process, if it runs."""
        if self._process is None:
            return
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
        # The signal returns before the last thread of the process has stopped.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)
