"""Runs a viewer of traces, arize-phoenix, from an environment of its own.

The viewer is no dependency of the tests, since its requirements contradict those of engines. Its
settings turn off all calls to other hosts, and it listens on the loopback address only. Its gRPC
port ignores the setting of the address, so `SERVE` changes the address before it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.server_process import free_port

PACKAGE = "arize-phoenix==20.26.1"
HOME = Path(__file__).resolve().parents[3] / ".venv-viewer"
START_S = 120.0
SERVE = """
import sys, grpc
make = grpc.aio.server
def on_loopback(*arguments, **options):
    server = make(*arguments, **options)
    add = server.add_insecure_port
    server.add_insecure_port = lambda address: add(address.replace("[::]", "127.0.0.1"))
    return server
grpc.aio.server = on_loopback
from phoenix.server.main import main
sys.argv = ["phoenix", "serve"]
main()
"""
OFFLINE = {
    "PHOENIX_TELEMETRY_ENABLED": "false",
    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
    "PHOENIX_AGENTS_DISABLE_WEB_ACCESS": "true",
    "PHOENIX_AGENTS_DISABLE_BASH": "true",
    "PHOENIX_AGENTS_DISABLE_GITHUB": "true",
    "PHOENIX_ENABLE_MCP_SERVER": "false",
}


@dataclass(frozen=True, slots=True)
class Viewer:
    """A viewer that runs."""

    url: str
    pid: int

    @property
    def traces_endpoint(self) -> str:
        """The endpoint for OTLP over HTTP."""
        return f"{self.url}/v1/traces"

    def get(self, path: str, **query: str | int) -> Any:
        """Return the data of a response of its REST interface."""
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.loads(response.read())["data"]

    def spans(self, **query: str | int) -> list[Any]:
        """Return spans of its only project."""
        return list(self.get("/v1/projects/default/spans", limit=100, **query))

    def page(self, trace_id: str, span: str) -> str:
        """Return the URL of a trace with a selected span."""
        [project] = self.get("/v1/projects")
        selected = urllib.parse.urlencode({"selectedSpanNodeId": span})
        return f"{self.url}/projects/{project['id']}/traces/{trace_id}?{selected}"


def install() -> Path:
    """Make the viewer's environment unless it exists; return its interpreter."""
    python, made = HOME / "bin" / "python", HOME / ".made-of"
    if not made.exists() or made.read_text() != PACKAGE:
        print(f"installing {PACKAGE} (a minute or two, 850 MB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", HOME], check=True)
        quiet = ("--disable-pip-version-check", "--quiet")
        subprocess.run([python, "-m", "pip", *quiet, "install", PACKAGE], check=True)
        made.write_text(PACKAGE)
    return python


@contextmanager
def viewing(folder: Path) -> Iterator[Viewer]:
    """Run a viewer, with its data and log in `folder`, until `with` ends."""
    python, port, log = install(), free_port(), folder / "viewer.log"
    base = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OTEL", "PHOENIX", "PYTHON"))
    }
    settings = {
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_WORKING_DIR": str(folder / "viewer"),
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [python, "-c", SERVE],
            cwd=folder,
            env=base | OFFLINE | settings,
            stdout=sink,
            stderr=sink,
        )
    viewer = Viewer(f"http://127.0.0.1:{port}", process.pid)
    try:
        until = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < until:
            try:
                viewer.get("/v1/projects")
            except OSError:
                time.sleep(0.2)  # it sends no signal when it listens
            else:
                break
        else:
            raise AssertionError(f"the viewer did not start:\n{log.read_text()[-6000:]}")
        yield viewer
    finally:
        process.terminate()
        process.wait()


def listens_at(pid: int) -> set[str]:
    """Return the addresses on which a process listens for TCP connections, as the kernel's hex."""
    files = Path(f"/proc/{pid}/fd").iterdir()
    sockets = {str(file.readlink()) for file in files if file.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        row[1].partition(":")[0]
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in sockets  # 0A: LISTEN
    }
